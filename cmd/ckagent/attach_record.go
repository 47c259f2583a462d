package main

import (
	"os"
	"strings"
	"sync"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/plugins/policy"
)

// asking records what the policy of a VM is told, each time it is asked, from the first
// checkpoint on: before that nothing is known of what they take.
type asking struct {
	path string

	mu   sync.Mutex
	t    *traceWriter
	last int64 // now_ns of the last line
	err  error // the first; nothing is written after it
}

func recordAsking(path string) (*asking, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, problem.New(problem.Failed, "record signals", path, "%w", err)
	}
	return &asking{path: path, t: newTraceWriter(f, strings.HasSuffix(path, ".gz"))}, nil
}

func (r *asking) asked(s *policy.Signals) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil || s.GetLastSuccessNs() == 0 || s.GetNowNs() <= r.last {
		return
	}
	r.last = s.GetNowNs()
	r.err = r.t.write(s)
}

// close returns what failed, of which checkpoints took no notice.
func (r *asking) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := r.t.Close()
	if r.err == nil {
		r.err = err
	}
	if r.err != nil {
		return problem.New(problem.Failed, "record signals", r.path, "%w", r.err)
	}
	return nil
}
