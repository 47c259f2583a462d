package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
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
		goleak.VerifyTestMain(m, goleak.Cleanup(leave(dir)))
		return
	}
	build := exec.Command("go", "build", "-trimpath", "-o", release, "github.com/ckagent/ckagent/cmd/ckagent")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v: %v\n%s", build.Args, err, out)
		os.RemoveAll(dir)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(leave(dir)))
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
