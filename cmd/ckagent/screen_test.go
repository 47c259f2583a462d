package main

import (
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/signals"
)

// TestScreen: frames fit, and what is left of a longer one is cleared.
func TestScreen(t *testing.T) {
	var out strings.Builder
	s := &screen{out: &out, size: func() (int, int) { return 5, 4 }}
	s.show("one\nlonger than that\n")
	if got := out.String(); got != "\x1b[2J\x1b[Hone\x1b[K\r\nlonge\x1b[K\r\n\x1b[J" {
		t.Errorf("%q", got)
	}
	out.Reset()
	s.size = func() (int, int) { return 20, 4 }
	s.show("a\nb\nc\nd\ne\n")
	if got := out.String(); strings.Contains(got, "\x1b[2J") || strings.Count(got, "\r\n") != 3 || !strings.Contains(got, "... 3 lines more") {
		t.Errorf("%q", got)
	}
	if newScreen(&out) != nil {
		t.Error("a string is a terminal")
	}
}

// TestTopFitsTheTerminal: side by side where there is room, else below each other.
func TestTopFitsTheTerminal(t *testing.T) {
	snapshot := signals.Snapshot{Time: time.Now(), VMs: []signals.Sample{{PID: 4711, VM: "web", State: signals.StateUnprotected}}}
	for columns, lines := range map[int]int{200: 3, 80: 6} {
		var out strings.Builder
		v := topView{a: &app{}, screen: &screen{out: &out, size: func() (int, int) { return columns, 50 }}}
		v.show(snapshot)
		got := strings.Count(out.String(), "\r\n")
		if got != lines || strings.Count(out.String(), "4711") != lines/3 || !strings.Contains(out.String(), "OPS/S") {
			t.Errorf("%d columns: %d lines, want %d:\n%s", columns, got, lines, out.String())
		}
	}
}
