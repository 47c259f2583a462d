package torture

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// tap names the messages between agent and QEMU and acts on one of them. A name
// is command, reply or event, what it is about, and how many of the kind came
// before: "reply query-status#2".
type tap struct {
	mu      sync.Mutex
	steps   []string
	counts  map[string]int
	asked   map[string]string // command of an id
	trap    map[string]func(ctx context.Context) vmtest.Verdict
	onEach  func(step string)
	stopped bool                                        // STOP seen, RESUME not
	current [2]func(ctx context.Context) vmtest.Verdict // by direction, each a goroutine of the proxy
}

func direction(m vmtest.Message) int {
	if m.FromQEMU {
		return 1
	}
	return 0
}

// reset starts a new run with traps.
func (t *tap) reset(trap map[string]func(context.Context) vmtest.Verdict, onEach func(string)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.steps, t.counts, t.asked, t.stopped = nil, map[string]int{}, map[string]string{}, false
	t.trap, t.onEach, t.current = trap, onEach, [2]func(context.Context) vmtest.Verdict{}
}

// seen is the steps so far.
func (t *tap) seen() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]string(nil), t.steps...)
}

// paused reports whether the guest is stopped, as far as QEMU said.
func (t *tap) paused() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.stopped
}

// match notes a message and reports whether there is a trap for it.
func (t *tap) match(m vmtest.Message) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.counts == nil {
		return false
	}
	name := ""
	id := string(m.ID)
	switch {
	case m.Command != "":
		name = "command " + m.Command
		if m.Command == "human-monitor-command" {
			var a struct {
				Arguments struct {
					Line string `json:"command-line"`
				}
			}
			_ = json.Unmarshal(m.Raw, &a) // the line only makes the name longer
			name += " " + a.Arguments.Line
		}
		if id != "" {
			t.asked[id] = name[len("command "):]
		}
	case m.Event != "":
		name = "event " + m.Event
		switch m.Event {
		case "STOP":
			t.stopped = true
		case "RESUME":
			t.stopped = false
		}
	case m.FromQEMU && id != "":
		name = "reply " + t.asked[id]
	case m.FromQEMU:
		name = "greeting"
	default:
		name = "bytes"
	}
	t.counts[name]++
	if n := t.counts[name]; n > 1 {
		name = fmt.Sprintf("%s#%d", name, n)
	}
	t.steps = append(t.steps, name)
	if t.onEach != nil {
		t.onEach(name)
	}
	f := t.trap[name]
	if f == nil {
		return false
	}
	delete(t.trap, name)
	t.current[direction(m)] = f
	return true
}

// decide springs the trap that match found.
func (t *tap) decide(ctx context.Context, m vmtest.Message) vmtest.Verdict {
	t.mu.Lock()
	f := t.current[direction(m)]
	t.current[direction(m)] = nil
	t.mu.Unlock()
	if f == nil {
		return vmtest.Pass
	}
	return f(ctx)
}
