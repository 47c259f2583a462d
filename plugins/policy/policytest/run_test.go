package policytest_test

import (
	"os/exec"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/ckagent/ckagent/plugins/policy/policytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func build(t *testing.T, pkg string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), filepath.Base(pkg))
	if out, err := exec.Command("go", "build", "-o", path, "github.com/ckagent/ckagent/"+pkg).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

func TestTemplate(t *testing.T) {
	policytest.Run(t, build(t, "plugins/policy/examples/nightly"), map[string]string{"hour": "4"})
}

// TestShipped is for the default alone: what the others decide is tested beside them,
// and the programs differ in nothing else.
func TestShipped(t *testing.T) { policytest.Run(t, build(t, "cmd/ckagent-policy-auto"), nil) }
