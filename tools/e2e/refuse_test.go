package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestUsage: a command line that makes no sense is exit 2 and says what would.
func TestUsage(t *testing.T) {
	x := newTool(t)
	for _, args := range [][]string{
		{"no-such-verb"}, {"checkpoint"}, {"checkpoint", "0"}, {"checkpoint", "-5"}, {"checkpoint", "1", "2"},
		{"checkpoint", "1", "--no-such-flag"}, {"checkpoint", "1", "--keep-last", "-1"},
		{"checkpoint", "1", "--min-free", "lots"}, {"checkpoint", "1", "--max-stall", "soon"},
		{"attach", "1", "--interval", "1ms"}, {"attach"}, {"explain"}, {"explain", "x"}, {"release"},
		{"ls", "extra"}, {"inspect"}, {"verify"}, {"rm"}, {"pin"}, {"gc", "extra"}, {"gc", "--keep-last", "1", "--dry-run"},
		{"restore"}, {"restore", "a", "b"}, {"restore", "a", "--map", "nothing"}, {"restore", "a", "--secret", "x"}, {"restore", "a", "--bandwidth", "fast"},
	} {
		r := x.run(t, append(args, "--json")...)
		if r.code != exitUsage {
			t.Errorf("want exit %d: %s", exitUsage, r)
			continue
		}
		// A flag error may come before --json was seen: then it is text on stderr.
		if r.out == "" {
			if !strings.Contains(r.err, "ckagent") {
				t.Errorf("no message: %s", r)
			}
			continue
		}
		wantFailure(t, r, exitUsage)
	}
	if _, err := os.Stat(x.store); !os.IsNotExist(err) {
		t.Errorf("a command line that makes no sense made a store: %v", err)
	}
}

// TestNotFound: what is not there is exit 6.
func TestNotFound(t *testing.T) {
	x := newTool(t)
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	pid := itoa(gone.ProcessState.Pid())
	for _, verb := range []string{"checkpoint", "attach", "explain"} {
		x.fails(t, exitNotFound, []string{pid}, append([]string{verb, pid}, storeArgs(x, verb)...)...)
	}
	for _, verb := range []string{"restore", "inspect", "verify", "rm", "pin", "unpin"} {
		x.fails(t, exitNotFound, nil, verb, "nothing-of-this-name", "--store", x.store)
		x.fails(t, exitNotFound, nil, verb, "20260101T000000.000Z-00000000", "--store", x.store)
	}
	if l := x.ls(t); len(l) != 0 {
		t.Errorf("ls of no store: %+v", l)
	}
}

func storeArgs(x *tool, verb string) []string {
	if verb == "explain" {
		return nil
	}
	return []string{"--store", x.store}
}

// TestNotAVM: what is no QEMU process is refused.
func TestNotAVM(t *testing.T) {
	x := newTool(t)
	sleeper := exec.Command("sleep", "600")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = sleeper.Process.Kill()
		_ = sleeper.Wait() // killed, as wanted
	}()
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 4})
	// In a pid namespace of its own a test sees none.
	kthread := ""
	if comm, err := os.ReadFile("/proc/2/comm"); err == nil && strings.TrimSpace(string(comm)) == "kthreadd" {
		kthread = "2"
	}
	for _, verb := range []string{"checkpoint", "attach", "explain"} {
		x.fails(t, exitRefused, []string{"QEMU"}, append([]string{verb, itoa(sleeper.Process.Pid)}, storeArgs(x, verb)...)...)
		if kthread != "" {
			x.fails(t, exitRefused, []string{"not QEMU", "kernel thread"}, append([]string{verb, kthread}, storeArgs(x, verb)...)...)
		}
	}
	tasks, err := os.ReadDir("/proc/" + itoa(v.PID()) + "/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if task.Name() == itoa(v.PID()) {
			continue
		}
		for _, verb := range []string{"checkpoint", "attach", "explain"} {
			x.fails(t, exitNotFound, []string{"thread", "Tgid"}, append([]string{verb, task.Name()}, storeArgs(x, verb)...)...)
		}
		break
	}
	wantRunning(t, v)
	x.wantOnly(t)
}

// TestUnprotectable: machines that cannot be protected are refused by name before
// anything is touched.
func TestUnprotectable(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	mini := vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 4, Rate: 2000}
	with := func(args ...string) vmtest.Config {
		c := mini
		c.Args = args
		return c
	}
	for _, c := range []struct {
		name  string
		cfg   vmtest.Config
		words []string
	}{
		{name: "temporary disk", words: []string{"disk0", "snapshot=on"},
			cfg: with("-drive", "if=none,id=disk0,snapshot=on,format=raw,file="+disk, "-device", "virtio-blk-pci,drive=disk0")},
		{name: "not migratable", words: []string{"migrat"},
			cfg: with("-device", "nvme,serial=x,drive=n0", "-drive", "if=none,id=n0,format=raw,readonly=on,file="+disk)},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := newTool(t)
			v := vmtest.Start(t, c.cfg)
			for _, mode := range []string{"auto", "stop", "buffer", "cow"} {
				f := x.fails(t, exitRefused, c.words, "checkpoint", itoa(v.PID()), "--store", x.store, "--mode", mode)
				if f.Hint == "" {
					t.Errorf("no hint: %+v", f)
				}
			}
			var e explained
			x.json(t, &e, "explain", itoa(v.PID()))
			if e.Protects || len(e.Refusals) == 0 {
				t.Errorf("explain: %+v", e)
			}
			wantRunning(t, v)
			x.wantOnly(t)
		})
	}
}

// TestTwoAgents: one wins, the other says who has it.
func TestTwoAgents(t *testing.T) {
	x := newTool(t)
	b := newBed(t)
	held := b.at("add-fd", func() {
		holder := x.processes()
		f := x.fails(t, exitBusy, nil, "checkpoint", itoa(b.v.PID()), "--store", x.store)
		said := false
		for _, pid := range holder {
			said = said || strings.Contains(f.Message, itoa(pid))
		}
		if !said || !f.Retryable {
			t.Errorf("want the pid of one of %v, and retryable: %+v", holder, f)
		}
	})
	defer held()
	c := x.checkpoint(t, b.v.PID(), "--qmp", b.proxy.Path())
	b.wantReached(t, 1)
	wantRunning(t, b.v)
	x.wantOnly(t, c.ID)
}
