package policytest_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/ckagent/ckagent/plugins/policy/policytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const module = "github.com/ckagent/ckagent/"

func TestTemplate(t *testing.T) {
	policytest.Run(t, policytest.Build(t, module+"plugins/policy/examples/nightly"), map[string]string{"hour": "4"})
}

// TestShipped is for the default alone: what the others decide is tested beside them,
// and the programs differ in nothing else.
func TestShipped(t *testing.T) {
	policytest.Run(t, policytest.Build(t, module+"cmd/ckagent-policy-auto"), nil)
}
