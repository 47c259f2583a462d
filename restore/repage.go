package restore

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/restore/liveness"
	"github.com/ckagent/ckagent/restore/pager"
)

// Repaged is a restored VM whose paging was taken up again.
type Repaged struct {
	Schema    string `json:"schema"`
	ID        string `json:"id"`
	VM        string `json:"vm"`
	QEMUPID   int    `json:"qemu_pid"`
	RunDir    string `json:"run_dir"`
	Faults    uint64 `json:"faults"`
	DrainedNS int64  `json:"drained_ns,omitempty"` // from here; 0 if nobody waited
}

// Repage takes up the paging of a restored VM: for an operator who finds one waiting
// because both processes of its pager died at once, or because its store was away
// for longer than the pager tries. who is the pid of its QEMU or a name. It returns
// when all memory is in, or with detach as soon as a pager is at work. It may be
// called at any time: a pager that is alive is joined.
func Repage(ctx context.Context, root, who string, detach bool) (*Repaged, error) {
	if root == "" {
		root = RunRoot
	}
	dir, s, err := findRestored(root, who)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	p, err := pager.Resume(ctx, dir)
	if err != nil {
		return nil, err
	}
	res := &Repaged{Schema: "ckagent.page/1", ID: s.Checkpoint, VM: s.Name, QEMUPID: s.QEMU.PID, RunDir: dir}
	if !detach {
		if err = p.Wait(ctx); err == nil {
			res.DrainedNS = time.Since(began).Nanoseconds()
		}
	}
	res.Faults = p.Stats().Faults
	// Whoever stops waiting does not stop the VM.
	return res, errors.Join(err, p.Detach())
}

// findRestored is the run directory of a restored VM that lives.
func findRestored(root, who string) (dir string, s state, err error) {
	const op = "find restored VM"
	boot, err := liveness.BootID()
	if err != nil {
		return "", s, problem.New(problem.Failed, op, who, "%w", err)
	}
	entries, err := os.ReadDir(root)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", s, problem.New(problem.Failed, op, root, "%w", err)
	}
	pid, _ := strconv.Atoi(who) // names are never numbers
	for _, e := range entries {
		raw, err := os.ReadFile(filepath.Join(root, e.Name(), stateName))
		var one state
		if err != nil || json.Unmarshal(raw, &one) != nil || one.BootID != boot || !one.QEMU.alive() {
			continue
		}
		if one.QEMU.PID != pid && one.Name != who && one.VM != who {
			continue
		}
		if dir != "" {
			return "", s, problem.New(problem.Usage, op, who, "pids %d and %d have this name", s.QEMU.PID, one.QEMU.PID).
				WithHint("name the one you mean by its pid")
		}
		dir, s = filepath.Join(root, e.Name()), one
	}
	if dir == "" {
		return "", s, problem.New(problem.NotFound, op, who, "no living VM restored by ckagent has this pid or name")
	}
	return dir, s, nil
}
