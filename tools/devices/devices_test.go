package devices

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/tools/vmtest"
)

var update = flag.Bool("update", false, "write the table anew")

const page = "../../docs/devices.md"

const notTried = "not tried"

// TestTable tries every device and compares with the table.
func TestTable(t *testing.T) {
	if testing.Short() {
		vmtest.Skip(t, "short", "starts a machine for each device")
	}
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	committed, err := Parse(string(text))
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, d := range devices() {
		t.Run(d.name, func(t *testing.T) {
			row, missing := try(t, d)
			line := row.Line()
			if missing != "" {
				t.Logf("not tried here: %s", missing)
				if line = committed[d.name]; line == "" {
					row.Result, row.Says = notTried, missing+" on the host where this table was made. "+d.limit
					line = row.Line()
				}
			}
			lines = append(lines, line)
			switch old := committed[d.name]; {
			case old == line || *update:
			case strings.Contains(old, "| "+notTried+" |"):
				t.Logf("this host can try it: %s", line)
			default:
				t.Errorf("docs/devices.md says\n%s\nand this is seen:\n%s\n(go test ./tools/devices -run TestTable -args -update writes it anew)", old, line)
			}
			delete(committed, d.name)
		})
	}
	delete(committed, "device")
	delete(committed, "---")
	if t.Failed() {
		return
	}
	if *update {
		out, err := Replace(string(text), lines)
		if err == nil {
			err = os.WriteFile(page, []byte(out), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	for name := range committed {
		t.Errorf("docs/devices.md has a row %q that nobody tries", name)
	}
}

// explained, checkpointed, restored and failure are what verbs print.
type explained struct {
	Protects bool `json:"can_protect"`
	Refusals []struct{ Code, Object, Reason, Advice string }
}

type checkpointed struct {
	ID     string   `json:"id"`
	Mode   string   `json:"mode"`
	Reason string   `json:"reason"`
	Notes  []string `json:"notes"`
}

type restored struct {
	QEMUPID   int      `json:"qemu_pid"`
	QMP       string   `json:"qmp"`
	RunDir    string   `json:"run_dir"`
	LazyBytes uint64   `json:"lazy_bytes"`
	Notes     []string `json:"notes"`
}

type failure struct {
	Error struct{ Code, Message, Hint string } `json:"error"`
}

// try takes a machine with the device as far as it goes.
func try(t *testing.T, d device) (row Row, missing string) {
	dir, err := os.MkdirTemp("", "devices-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	h := &host{dir: dir}
	cfg := d.cfg
	cfg.Dir, cfg.Control = dir, true
	if !cfg.OVMF {
		cfg.Guest, cfg.WSMiB, cfg.Rate = vmtest.Mini, 4, 2000
	}
	if cfg.MemoryMiB == 0 {
		cfg.MemoryMiB = 64
	}
	row = Row{Device: d.name, Args: d.shown}
	if d.with != nil {
		more, missing := d.with(t, h)
		if missing != "" {
			return row, missing
		}
		cfg.Args = append(cfg.Args, more...)
	}
	if h.netns != "" {
		cfg.Binary = filepath.Join(dir, "qemu-system-x86_64")
		if err := os.WriteFile(cfg.Binary, []byte("#!/bin/sh\nexec ip netns exec "+h.netns+" qemu-system-x86_64 \"$@\"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	v := vmtest.Start(t, cfg)
	m := dial(t, v.ControlPath())
	if d.plug != nil {
		d.plug(t, m)
	}
	mini := v.Config().Guest == vmtest.Mini
	goesOn(t, v, m, mini)

	var e explained
	if code := h.run(t, &e, "explain", fmt.Sprint(v.PID())); code != 0 {
		t.Fatalf("explain: exit %d", code)
	}
	store := filepath.Join(dir, "store")
	var raw json.RawMessage
	switch code := h.run(t, &raw, "checkpoint", fmt.Sprint(v.PID()), "--store", store, "--qmp", v.QMPPath()); code {
	case 0:
	case 3:
		f := decode[failure](t, raw)
		row.Result = Refused
		if len(e.Refusals) == 0 { // found later than explain looks
			row.Says = Plain(f.Error.Message)
		}
		for i, r := range e.Refusals {
			if i > 0 {
				row.Says += "; "
			}
			row.Says += Plain(fmt.Sprintf("`%s`: %s. Instead: %s", r.Code, r.Reason, r.Advice))
			if !strings.Contains(f.Error.Message, r.Reason) {
				t.Errorf("explain refuses it for %q, checkpoint says %q", r.Reason, f.Error.Message)
			}
		}
		goesOn(t, v, m, mini) // as if nothing had happened
		return row, ""
	default:
		t.Fatalf("checkpoint: exit %d: %s", code, raw)
	}
	if !e.Protects {
		t.Errorf("a checkpoint was taken of what explain refuses: %+v", e.Refusals)
	}
	c := decode[checkpointed](t, raw)
	goesOn(t, v, m, mini)
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	var limits []string
	if d.limit != "" {
		limits = append(limits, d.limit)
	}
	if c.Mode != "cow" {
		limits = append(limits, "mode "+c.Mode+": "+c.Reason)
	}
	limits = append(limits, c.Notes...)
	from := v.SerialSize()
	switch code := h.run(t, &raw, "restore", c.ID, "--store", store, "--disk-dir", filepath.Join(dir, "restored")); code {
	case 0:
		r := decode[restored](t, raw)
		t.Cleanup(func() { os.RemoveAll(r.RunDir) })
		w := vmtest.StartAdopted(t, r.QEMUPID, r.QMP, v.SerialPath(), from)
		goesOn(t, w, dial(t, r.QMP), mini)
		if r.LazyBytes < uint64(cfg.MemoryMiB)<<20 {
			limits = append(limits, "restored with all memory at once")
		}
		limits = append(limits, r.Notes...)
	case 3:
		limits = append(limits, "a restore is refused: "+decode[failure](t, raw).Error.Message)
	default:
		t.Fatalf("restore: exit %d: %s", code, raw)
	}
	row.Result = Works
	if len(limits) > 0 {
		row.Result, row.Says = Limited, Plain(strings.Join(limits, "; "))
	}
	return row, ""
}

// run runs a verb in the machine's network and decodes the object it printed.
func (h *host) run(t *testing.T, out any, args ...string) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	argv := append([]string{binary, "--json"}, args...)
	if h.netns != "" {
		argv = append([]string{"ip", "netns", "exec", h.netns}, argv...)
	}
	c := exec.CommandContext(ctx, argv[0], argv[1:]...)
	c.Stderr = os.Stderr
	raw, err := c.Output()
	if c.ProcessState == nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw, out); err != nil {
		t.Fatalf("ckagent %s: %v: %q", strings.Join(args, " "), err, raw)
	}
	return c.ProcessState.ExitCode()
}

func decode[T any](t *testing.T, raw json.RawMessage) (v T) {
	t.Helper()
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatalf("%v: %s", err, raw)
	}
	return v
}

func dial(t *testing.T, path string) *vmtest.Monitor {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	m, err := vmtest.DialMonitor(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func do(t *testing.T, m *vmtest.Monitor, command string, arguments any) {
	t.Helper()
	if err := m.Execute(t.Context(), command, arguments, nil); err != nil {
		t.Fatal(err)
	}
}

// goesOn fails unless the machine runs and its guest gets on: it writes its memory,
// and all of what it reads is right; firmware runs through code.
func goesOn(t *testing.T, v *vmtest.VM, m *vmtest.Monitor, mini bool) {
	t.Helper()
	var s struct{ Status string }
	if err := m.Execute(t.Context(), "query-status", nil, &s); err != nil || s.Status != "running" {
		t.Fatalf("it is %q: %v", s.Status, err)
	}
	if mini {
		v.WaitProgress(t, 50)
		v.Invariants()
		return
	}
	var seen []string
	await(t, "the firmware runs", func() bool {
		text, err := m.HMP(t.Context(), "info registers")
		if err != nil {
			t.Fatal(err)
		}
		at := strings.Index(text, "RIP=")
		if at < 0 {
			return false
		}
		if rip := text[at:min(at+20, len(text))]; !slices.Contains(seen, rip) {
			seen = append(seen, rip)
		}
		return len(seen) >= 3
	})
}
