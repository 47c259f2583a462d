package signals

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// binary is what users get, built once.
var binary string

// campaign asks for every load instead of a choice; as a duration ("90s") it is that
// of the test of many VMs.
var campaign = os.Getenv("CKAGENT_SIGNALS_CAMPAIGN") != ""

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "signals-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binary = filepath.Join(dir, "ckagent")
	build := exec.Command("go", "build", "-trimpath", "-o", binary, "github.com/ckagent/ckagent/cmd/ckagent")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v: %v\n%s", build.Args, err, out)
		os.RemoveAll(dir)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(dir)
		os.Exit(code)
	}))
}

// run runs a verb and decodes what it prints; it returns the exit code.
func run(t testing.TB, out any, args ...string) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, binary, append(args, "--json")...)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	b, err := c.Output()
	exit, failed := errors.AsType[*exec.ExitError](err)
	if err != nil && !failed {
		t.Fatal(err)
	}
	if out != nil {
		if err := json.Unmarshal(b, out); err != nil {
			t.Fatalf("%v: %v\n%s\n%s", c.Args, err, b, stderr.String())
		}
	}
	if failed {
		t.Logf("%v: %s%s", args, b, stderr.String())
		return exit.ExitCode()
	}
	return 0
}

func pidOf(n int) string { return strconv.Itoa(n) }
