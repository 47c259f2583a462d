package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/ckagent/ckagent/agent/capture/proving"
)

// release is the binary that users get.
var release string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	release = filepath.Join(dir, "ckagent")
	if given := os.Getenv("CKAGENT_E2E_BINARY"); given != "" {
		if err := copyFile(release, given, 0o755); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.RemoveAll(dir)
			os.Exit(1)
		}
		proveEngine()
		goleak.VerifyTestMain(m, goleak.Cleanup(leave(dir)))
		return
	}
	build := exec.Command("go", "build", "-trimpath", "-o", release, "github.com/ckagent/ckagent/cmd/ckagent")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v: %v\n%s", build.Args, err, out)
		os.RemoveAll(dir)
		os.Exit(1)
	}
	proveEngine()
	goleak.VerifyTestMain(m, goleak.Cleanup(leave(dir)))
}

// proveEngine has engine bpf tried before any test, so that engine auto is the same one in
// all of them, and no daemon of theirs has it to do.
func proveEngine() {
	paths, err := proving.New([]string{release}).All(context.Background(), proving.ByAuto)
	for _, p := range paths {
		if p.Outcome != proving.Proved {
			err = errors.Join(err, fmt.Errorf("engine bpf, %s, %s RAM: %s: %s", p.Accel, p.RAM, p.Outcome, p.Detail))
		}
	}
	if err != nil { // the tests of the engine will say what it costs
		fmt.Fprintln(os.Stderr, err)
	}
}

func leave(dir string) func(int) {
	return func(code int) {
		os.RemoveAll(dir)
		os.Exit(code)
	}
}

func copyFile(to, from string, mode os.FileMode) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, mode)
}
