package e2e

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// diskBed is a machine with a disk that takes a while to copy.
type diskBed struct {
	v     *vmtest.VM
	m     *vmtest.Monitor // of the test itself
	image string
}

func newDiskBed(t *testing.T) diskBed {
	t.Helper()
	image := filepath.Join(t.TempDir(), "disk.qcow2")
	for _, args := range [][]string{
		{"qemu-img", "create", "-q", "-f", "qcow2", image, "64M"},
		{"qemu-io", "-f", "qcow2", "-c", "write -P 5 0 64M", image},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v %s", args, err, out)
		}
	}
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 4, Rate: 2000, Idle: true, Control: true,
		Args: []string{"-drive", "if=none,id=disk0,format=qcow2,file=" + image, "-device", "virtio-blk-pci,drive=disk0,id=v"}})
	return diskBed{v, monitor(t, v.ControlPath()), image}
}

// query is what QEMU says, as text.
func (b diskBed) query(t testing.TB, command string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var v json.RawMessage
	if err := b.m.Execute(ctx, command, nil, &v); err != nil {
		t.Fatal(err)
	}
	return string(v)
}

// awaitCopy returns once the disk is being copied.
func (b diskBed) awaitCopy(t testing.TB) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); <-tick.C {
		if jobs := b.query(t, "query-jobs"); strings.Contains(jobs, "ckagent-copy-0") && !strings.Contains(jobs, "concluded") {
			return
		}
	}
	t.Fatal("no copy was begun")
}

// wantClean fails unless the block layer is free of us; bitmaps may stay or not.
func (b diskBed) wantClean(t testing.TB, bitmaps bool) {
	t.Helper()
	for _, command := range []string{"query-block", "query-named-block-nodes", "query-jobs", "query-fdsets"} {
		said := b.query(t, command)
		if bitmaps {
			said = strings.ReplaceAll(said, "ckagent-bitmap-", "")
		}
		if strings.Contains(said, "ckagent") {
			t.Errorf("%s: %s", command, said)
		}
	}
	wantRunning(t, b.v)
}

func volumes(t testing.TB, x *tool) int {
	t.Helper()
	list, err := filepath.Glob(filepath.Join(x.store, "vms/*/disks/*"))
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// TestAgentEndsWhileItCopiesDisks: whatever becomes of the agent, the guest gets its
// disk back as it was, and the next checkpoint holds it.
func TestAgentEndsWhileItCopiesDisks(t *testing.T) {
	for name, harm := range map[string]func(t *testing.T, x *tool, s *started, b diskBed){
		"killed": func(t *testing.T, x *tool, s *started, _ diskBed) {
			s.signal(unix.SIGKILL)
			s.wait(t, 10*time.Second)
		},
		"frozen": func(t *testing.T, x *tool, s *started, _ diskBed) {
			s.signal(unix.SIGSTOP)
			s.wait(t, 10*time.Second) // its guardian ends it
		},
		"interrupted": func(t *testing.T, x *tool, s *started, _ diskBed) {
			s.signal(unix.SIGINT)
			if r := s.wait(t, 10*time.Second); r.code != exitCancelled {
				t.Errorf("want exit %d: %s", exitCancelled, r)
			}
		},
		"killed with its helpers and released": func(t *testing.T, x *tool, s *started, b diskBed) {
			for _, pid := range x.processes() { // frozen first, or one would act on another's death
				_ = unix.Kill(pid, unix.SIGSTOP)
			}
			for _, pid := range x.processes() {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
			s.wait(t, 10*time.Second)
			if !strings.Contains(b.query(t, "query-named-block-nodes"), "ckagent-cbw-0") {
				t.Error("nothing was left to release")
			}
			var r struct {
				Disks struct{ Jobs, Filters, Nodes []string }
			}
			x.json(t, &r, "release", itoa(b.v.PID()))
			if len(r.Disks.Filters) != 1 || len(r.Disks.Nodes) == 0 {
				t.Errorf("released %+v", r)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			x := newTool(t)
			b := newDiskBed(t)
			s := x.start(t, "checkpoint", itoa(b.v.PID()), "--store", x.store, "--disk-speed", "2M")
			b.awaitCopy(t)
			harm(t, x, s, b)
			x.wantNoProcess(t)
			b.wantClean(t, true)
			x.wantOnly(t)
			c := x.checkpoint(t, b.v.PID())
			b.wantClean(t, true)
			x.wantOnly(t, c.ID)
			var gone struct{ Removed []string }
			x.json(t, &gone, "gc", "--store", x.store)
			if n := volumes(t, x); n != 1 {
				t.Errorf("%d volumes of one checkpoint of one disk", n)
			}
			var verified struct{ Verified bool }
			x.json(t, &verified, "verify", c.ID, "--store", x.store)
			var d struct {
				Detached []struct {
					Bitmaps []string
				}
			}
			x.json(t, &d, "detach", itoa(b.v.PID()))
			if len(d.Detached) != 1 || len(d.Detached[0].Bitmaps) != 1 {
				t.Errorf("detached %+v", d)
			}
			b.wantClean(t, false)
		})
	}
}

// TestDisksLeftOut: said by the checkpoint, and by the manifest.
func TestDisksLeftOut(t *testing.T) {
	x := newTool(t)
	b := newDiskBed(t)
	r := x.run(t, "checkpoint", itoa(b.v.PID()), "--store", x.store, "--disks", "none")
	if r.code != exitOK || !strings.Contains(r.out, "disk disk0") || !strings.Contains(r.out, "NOT in this checkpoint") {
		t.Errorf("%s", r)
	}
	b.wantClean(t, false)
	var in struct {
		Manifest struct {
			Requires []string
			Disks    []struct{ Name, Method string }
		}
	}
	x.json(t, &in, "inspect", x.ls(t)[0].ID, "--store", x.store)
	if m := in.Manifest; !slices.Contains(m.Requires, "disks") || len(m.Disks) != 1 || m.Disks[0].Method != "none" {
		t.Errorf("manifest %+v", m)
	}
	if _, err := os.Stat(filepath.Join(x.store, "vms")); err != nil || volumes(t, x) != 0 {
		t.Errorf("%d volumes %v", volumes(t, x), err)
	}
}
