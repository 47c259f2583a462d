package agent

import (
	"errors"
	"testing"

	"github.com/ckagent/ckagent/agent/problem"
)

// What passes must not end the protection of a VM: nobody would notice before the
// checkpoint is needed.
func TestWhatEndsAProtection(t *testing.T) {
	for _, c := range []struct {
		err    error
		proven bool
		want   bool
	}{
		{problem.New(problem.Refused, "protect", "", "a device cannot be saved"), false, true},
		{problem.New(problem.Refused, "protect", "", "a backup job is under way"), true, false},
		{problem.New(problem.Usage, "checkpoint", "", "mode x"), true, true},
		{problem.New(problem.NotFound, "apply retention", "", "removed by somebody else"), false, false},
		{problem.New(problem.Store, "write", "", "full"), false, false},
		{problem.New(problem.Busy, "attach", "", "monitor"), false, false},
		{errors.New("anything"), true, false},
	} {
		if got := hopeless(c.err, c.proven); got != c.want {
			t.Errorf("%v, proven %v: %v, want %v", c.err, c.proven, got, c.want)
		}
	}
}
