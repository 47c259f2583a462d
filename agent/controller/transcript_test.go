package controller

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write what the machine does into the transcripts")

// A transcript is prose, events and what follows from them:
//
//	# Comments, and empty lines.
//	10s: a turn is granted
//	    arming: begin a checkpoint
//
// An event stands at the beginning of a line, behind its time; what the machine then
// does is indented: its state, until when it waits, and its commands. "machine" begins
// a new one.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal(err, "no transcripts")
	}
	for _, path := range files {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txt"), func(t *testing.T) {
			was, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			is, err := replayTranscript(string(was))
			if err != nil {
				t.Fatal(err)
			}
			if *update {
				if err := os.WriteFile(path, []byte(is), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, got := strings.Split(string(was), "\n"), strings.Split(is, "\n")
			for i := range max(len(want), len(got)) {
				if i >= len(want) || i >= len(got) || want[i] != got[i] {
					t.Fatalf("line %d differs; the machine does:\n%s", i+1, is)
				}
			}
		})
	}
}

var zero = time.Unix(0, 0)

func replayTranscript(text string) (string, error) {
	var out strings.Builder
	var m *Machine
	for n, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		if strings.HasPrefix(line, "    ") {
			continue
		}
		fmt.Fprintln(&out, line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		var commands []Command
		if setting, ok := strings.CutPrefix(line, "machine"); ok {
			cfg, err := parseConfig(setting)
			if err != nil {
				return "", fmt.Errorf("line %d: %w", n+1, err)
			}
			m, commands = New(cfg, zero)
		} else {
			at, phrase, _ := strings.Cut(line, ": ")
			d, err := time.ParseDuration(at)
			if err != nil {
				return "", fmt.Errorf("line %d: %w", n+1, err)
			}
			e, err := parseEvent(phrase)
			if err != nil {
				return "", fmt.Errorf("line %d: %w", n+1, err)
			}
			commands = m.Step(zero.Add(d), e)
		}
		fmt.Fprintf(&out, "    %s", m.State())
		if w := m.Wake(); !w.IsZero() {
			fmt.Fprintf(&out, " until %v", w.Sub(zero))
		}
		for i, c := range commands {
			fmt.Fprintf(&out, "%s%s", map[bool]string{true: ": ", false: "; "}[i == 0], commandText(c))
		}
		fmt.Fprintln(&out)
	}
	return out.String(), nil
}

func parseConfig(text string) (Config, error) {
	cfg := Config{MinInterval: time.Second, PreparedLimit: 5 * time.Second, HeldLimit: 100 * time.Millisecond,
		Revivals: []time.Duration{time.Second, 10 * time.Second}}
	for _, word := range strings.Fields(text) {
		switch name, value, _ := strings.Cut(word, "="); name {
		case "on-death":
			var ok bool
			if cfg.OnDeath, ok = ParseOnDeath(value); !ok {
				return cfg, fmt.Errorf("%q", word)
			}
		case "proven":
			cfg.Proven = true
		default:
			return cfg, fmt.Errorf("unknown setting %q", word)
		}
	}
	return cfg, nil
}

// phrases are the events without a parameter.
var phrases = map[string]Event{
	"time passes": Tick{}, "another policy is in charge": PolicyChanged{}, "the policy wants none": Decided{},
	"the operator cancels": CancelWanted{}, "the operator detaches": DetachWanted{}, "the agent ends": Stopping{},
	"a turn is granted": Admitted{}, "RAM is armed": Armed{}, "the guest stands still": Stopped{}, "its state is fixed": Fixed{},
	"the guest runs again": Resumed{}, "it is tried again": Retaken{}, "the checkpoint exists": Taken{}, "older ones are dropped": Retained{},
	"the restore succeeded": Restored{true}, "the restore failed": Restored{false},
}

func parseEvent(phrase string) (Event, error) {
	if e, ok := phrases[phrase]; ok {
		return e, nil
	}
	var n uint64
	var a, b string
	after := func(text string) time.Time {
		d, err := time.ParseDuration(text)
		if err != nil {
			return time.Time{}
		}
		return zero.Add(d)
	}
	scan := func(format string, into ...any) bool {
		k, err := fmt.Sscanf(phrase, format, into...)
		return err == nil && k == len(into)
	}
	switch {
	case scan("the policy wants one at %s or to be asked at %s", &a, &b):
		return Decided{after(a), after(b)}, nil
	case scan("the policy wants one at %s", &a):
		return Decided{At: after(a)}, nil
	case scan("the policy wants to be asked at %s", &a):
		return Decided{Again: after(a)}, nil
	case scan("operator %d orders one", &n):
		return Ordered{n}, nil
	case scan("the checkpoint failed, %s", &a):
		for i, name := range failureNames {
			if name == a {
				return Failed{Failure(i)}, nil
			}
		}
	case scan("the VM ended, %s", &a):
		for i, name := range deathNames {
			if name == a {
				return Died{Death(i)}, nil
			}
		}
	case scan("group %d prepares", &n):
		return Prepare{n}, nil
	case scan("group %d suspends at %s", &n, &a):
		return Suspend{n, after(a)}, nil
	case scan("group %d resumes at %s", &n, &a):
		return Resume{n, after(a)}, nil
	case scan("group %d disbands", &n):
		return Disband{n}, nil
	}
	return nil, fmt.Errorf("unknown event %q", phrase)
}

func commandText(c Command) string {
	switch c := c.(type) {
	case Ask:
		return "ask the policy"
	case Enqueue:
		return "ask the host for a turn"
	case Leave:
		return "give the turn back"
	case Take:
		if c.Timed {
			return "begin a checkpoint in step with the group"
		}
		return "begin a checkpoint"
	case SuspendNow:
		return "suspend the guest"
	case ResumeNow:
		return "resume the guest"
	case GiveUp:
		return "give it up"
	case Retain:
		return "drop older ones"
	case Answer:
		return fmt.Sprintf("answer operator %d: %s", c.Order, c.Outcome)
	case Report:
		return fmt.Sprintf("report: %s", c.Outcome)
	case Say:
		return fmt.Sprintf("tell group %d: %s", c.Group, c.State)
	case Revive:
		return "restore the VM"
	case Announce:
		return fmt.Sprintf("announce: %s", c.How)
	case LetGo:
		return fmt.Sprintf("let go: %s", c.Why)
	}
	return fmt.Sprintf("%T", c)
}
