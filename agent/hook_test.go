package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
)

func TestHooks(t *testing.T) {
	dir := t.TempDir()
	said := filepath.Join(dir, "said")
	note := `echo "$CKAGENT_HOOK $CKAGENT_VM $CKAGENT_QEMU_PID $CKAGENT_RESULT $CKAGENT_CHECKPOINT $CKAGENT_ERROR" >>` + said
	v := &VM{Name: "web", pid: 42}
	failure := problem.New(problem.Busy, "checkpoint", "VM web", "somebody is at it")
	took := 0
	good := func() (string, error) { took++; return "id1", nil }
	bad := func() (string, error) { took++; return "", failure }
	for _, c := range []struct {
		name      string
		pre, post string
		take      func() (string, error)
		taken     int
		code      problem.Code // of the error, "" for none
		missed    string       // what is told of the post-hook
		said      string
	}{
		{"none", "", "", good, 1, "", "", ""},
		{"both", note, note, good, 1, "", "", "pre web 42   \npost web 42 ok id1 \n"},
		{"no checkpoint", note, note, bad, 1, problem.Busy, "", "pre web 42   \npost web 42 failed  checkpoint VM web: somebody is at it\n"},
		{"refused", note + "; echo busy day >&2; exit 3", note, good, 0, problem.Refused, "", "pre web 42   \npost web 42 failed"},
		{"post fails", "", "echo oh dear; false", good, 1, "", "oh dear", ""},
		{"too long", "sleep 60", "", good, 0, problem.Refused, "", ""},
		{"too long, with children", "(trap '' TERM; sleep 60) & sleep 60", "", good, 0, problem.Refused, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			took = 0
			_ = os.Remove(said)
			h := Hooks{Pre: c.pre, Post: c.post, Timeout: 500 * time.Millisecond}
			begin := time.Now()
			missed, err := h.around(t.Context(), v, c.take)
			if took != c.taken {
				t.Errorf("%d checkpoints, want %d", took, c.taken)
			}
			if c.code == "" && err != nil || c.code != "" && !problem.Is(err, c.code) {
				t.Errorf("error %v, want %q", err, c.code)
			}
			if (missed == nil) != (c.missed == "") || missed != nil && !strings.Contains(missed.Error(), c.missed) {
				t.Errorf("told %v, want %q", missed, c.missed)
			}
			raw, _ := os.ReadFile(said)
			if !strings.HasPrefix(string(raw), c.said) || c.said == "" && len(raw) > 0 {
				t.Errorf("the hooks saw %q, want %q", raw, c.said)
			}
			if time.Since(begin) > 20*time.Second {
				t.Error("a hook was waited for beyond its time")
			}
			if c.name == "refused" && !strings.Contains(err.Error(), "busy day") {
				t.Errorf("it does not say why: %v", err)
			}
		})
	}
	t.Run("interrupted", func(t *testing.T) {
		_ = os.Remove(said)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := Hooks{Pre: "sleep 60", Post: note, Timeout: time.Minute}.around(ctx, v, good)
		if !problem.Is(err, problem.Cancelled) || !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		if raw, _ := os.ReadFile(said); !strings.HasPrefix(string(raw), "post web 42 failed") {
			t.Errorf("the post-hook saw %q", raw)
		}
	})
}
