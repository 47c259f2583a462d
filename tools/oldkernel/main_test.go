package oldkernel

import (
	"os/exec"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// release builds the binary that users get.
func release(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ckagent")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "github.com/ckagent/ckagent/cmd/ckagent")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build.Args, err, out)
	}
	return path
}
