package restore

import (
	"context"
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/restore/pager"
)

// TestMain lets the test binary be the pager's processes, as ckagent is.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		var err error
		switch os.Args[1] {
		case pager.VerbWorker:
			err = pager.Main(context.Background(), os.Args[2:], Openers())
		case pager.VerbSupervisor:
			err = pager.SuperviseMain(context.Background(), os.Args[2:], Keepers())
		default:
			goleak.VerifyTestMain(m)
			return
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(problem.ExitCode(err))
	}
	goleak.VerifyTestMain(m)
}
