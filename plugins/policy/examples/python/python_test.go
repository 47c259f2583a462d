package python

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/ckagent/ckagent/plugins/policy/policytest"
)

// TestPolicy: the contract asks for nothing that Go alone has.
func TestPolicy(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ckagent-policy-python")
	if out, err := exec.Command("./build.sh", path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	policytest.Run(t, path, map[string]string{"interval": "60"})
}
