package pager

import (
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
)

// A pager both of whose processes were killed before they were given their task
// cannot start, and says so at once instead of holding the restore.
func TestBothKilledBeforeStart(t *testing.T) {
	blocks := []testBlock{{Pages: 64}}
	dir := writeTestImage(t, blocks, "none")
	tg := startTarget(t, targetSpec{Blocks: blocks, Threads: 1})
	cfg := tg.config(t, dir, blocks)
	warm, err := Prestart(t.Context(), cfg.Self, cfg.RunDir, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range warm.children {
		if err := p.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now()
	p, err := warm.Start(t.Context(), cfg)
	if err == nil {
		p.Close()
		t.Fatal("it started")
	}
	if !problem.Is(err, problem.Failed) || time.Since(begin) > 5*time.Second {
		t.Errorf("after %v: %v", time.Since(begin), err)
	}
}
