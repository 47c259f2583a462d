package diskcopy

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/ckagent/ckagent/agent/problem"
)

// TestVolumeCancelled: a checkpoint that is given up while a volume is made was cancelled,
// and the store is not to blame.
func TestVolumeCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f, err := makeVolume(ctx, filepath.Join(t.TempDir(), "v"), "", 1<<20)
	if err == nil {
		f.Close()
	}
	if problem.CodeOf(err) != problem.Cancelled {
		t.Errorf("%s: %v", problem.CodeOf(err), err)
	}
}
