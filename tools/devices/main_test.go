package devices

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
)

// binary is ckagent as users get it.
var binary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "devices-")
	if err == nil {
		binary = filepath.Join(dir, "ckagent")
		var out []byte
		out, err = exec.Command("go", "build", "-trimpath", "-o", binary, "github.com/ckagent/ckagent/cmd/ckagent").CombinedOutput()
		os.Stderr.Write(out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.RemoveAll(dir)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(dir)
		os.Exit(code)
	}))
}
