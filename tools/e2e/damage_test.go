package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// crypt is two checkpoints of a machine that is dead.
type crypt struct {
	x            *tool
	v            *vmtest.VM
	older, newer checkpoint
	dir          string // of the newer one
}

func newCrypt(t *testing.T, args ...string) *crypt {
	t.Helper()
	c := &crypt{x: newTool(t)}
	c.v = vmtest.Start(t, vmtest.Config{Name: fmt.Sprintf("%s-%d", strings.ToLower(t.Name()), os.Getpid()), Guest: vmtest.Mini,
		MemoryMiB: 64, WSMiB: 8, SweepMS: 500, Rate: 2000, Idle: true, Args: args})
	c.v.WaitProgress(t, 500)
	c.older = c.x.checkpoint(t, c.v.PID())
	c.v.WaitProgress(t, 500)
	// A full one: of a segment that belongs to another, only a part would count.
	c.newer = c.x.checkpoint(t, c.v.PID(), "--parent", "none")
	if err := c.v.Crash(); err != nil {
		t.Fatal(err)
	}
	c.dir = c.x.dir(t, c.newer.ID)
	return c
}

// machines are QEMU processes with the name of the dead one.
func (c *crypt) machines() (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range all {
		line, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(line, []byte(c.v.Config().Name)) || !bytes.Contains(line, []byte("qemu")) {
			continue
		}
		if pid, err := strconv.Atoi(strings.Split(path, "/")[2]); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// wantNothing fails if a restore that failed left a machine, a process or a run
// directory.
func (c *crypt) wantNothing(t *testing.T) {
	t.Helper()
	c.x.wantNoProcess(t)
	for _, pid := range c.machines() {
		t.Errorf("QEMU %d is still there", pid)
		c.kill(pid)
	}
	if left, _ := filepath.Glob("/run/ckagent/restored/*" + c.v.Config().Name + "*"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

func (c *crypt) kill(pid int) {
	if fd, err := openPID(pid); err == nil {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) // gone already, or goes now
		awaitExit(context.Background(), fd)
		closeFD(fd)
	}
}

// with runs a test while a file has other content (nil: while it is missing).
func (c *crypt) with(t *testing.T, path string, change func([]byte) []byte, do func()) {
	t.Helper()
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if changed := change(slices.Clone(old)); changed == nil {
		err = os.Remove(path)
	} else {
		err = os.WriteFile(path, changed, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	do()
	if err := os.WriteFile(path, old, 0o600); err != nil {
		t.Fatal(err)
	}
}

// harms are what happens to files.
var harms = []struct {
	name string
	do   func([]byte) []byte
}{
	{"missing", func([]byte) []byte { return nil }},
	{"empty", func([]byte) []byte { return []byte{} }},
	{"half", func(b []byte) []byte { return b[:len(b)/2] }},
	{"a byte short", func(b []byte) []byte { return b[:len(b)-1] }},
	{"a byte more", func(b []byte) []byte { return append(b, 0) }},
	{"first bit", func(b []byte) []byte { b[0] ^= 1; return b }},
	{"a bit inside", func(b []byte) []byte { b[len(b)/2] ^= 16; return b }},
	{"last bit", func(b []byte) []byte { b[len(b)-1] ^= 128; return b }},
}

// TestDamage: whatever becomes of a file of a checkpoint, it is found before
// anything wrong reaches a guest, and the older checkpoint is as good as ever.
func TestDamage(t *testing.T) {
	c := newCrypt(t)
	x := c.x
	files, err := filepath.Glob(filepath.Join(c.dir, "*"))
	if err != nil || len(files) < 4 {
		t.Fatalf("files: %q, %v", files, err)
	}
	for _, path := range files {
		for _, h := range harms {
			file := filepath.Base(path)
			t.Run(file+"/"+h.name, func(t *testing.T) {
				c.with(t, path, h.do, func() {
					want := exitIntegrity
					if file == "manifest.json" && h.name == "missing" {
						want = exitNotFound // without a manifest there is no checkpoint
					}
					x.fails(t, want, []string{c.newer.ID}, "verify", c.newer.ID, "--store", x.store)
					if file == "tags" {
						return // a restore does not need them
					}
					f := x.fails(t, want, []string{c.newer.ID}, "restore", c.newer.ID, "--store", x.store, "--eager")
					if testing.Verbose() {
						t.Log(f.Message)
					}
					c.wantNothing(t)
				})
			})
		}
	}
	t.Run("by the VM's name", func(t *testing.T) {
		c.with(t, filepath.Join(c.dir, "device-state"), harms[2].do, func() {
			r, w := x.restore(t, c.v.Config().Name, c.v.SerialPath())
			if r.ID != c.older.ID || !strings.Contains(strings.Join(r.Notes, "\n"), c.newer.ID) {
				t.Errorf("restored %s without a word on %s: %+v", r.ID, c.newer.ID, r)
			}
			x.wantDrained(t, r, w, true)
			w.Kill()
			removeLater(r)
		})
	})
	t.Run("lazily", func(t *testing.T) {
		// A bad page is met while the guest runs already: it is never filled, the
		// rest is, and the exit code tells.
		seg := filepath.Join(c.dir, "seg-0000")
		from := c.v.SerialSize()
		c.with(t, seg, harms[6].do, func() {
			f := x.fails(t, exitIntegrity, nil, "restore", c.newer.ID, "--store", x.store)
			t.Log(f.Message)
			report := vmtest.ParseReport(c.v.Serial()[min(from, int64(len(c.v.Serial()))):])
			if report.Bad != 0 {
				t.Errorf("the guest saw wrong pages: %+v", report)
			}
			pids := c.machines()
			for _, pid := range pids {
				c.kill(pid)
			}
			x.wantNoProcess(t)
			dirs, _ := filepath.Glob("/run/ckagent/restored/" + c.v.Config().Name + "-*")
			if len(pids) != 1 || len(dirs) != 1 {
				t.Errorf("want the one machine with its directory: %v, %q", pids, dirs)
				return
			}
			removeLater(restored{QEMUPID: pids[0], RunDir: dirs[0]})
		})
	})
	// All of it was put right again: both are whole.
	for _, id := range []string{c.older.ID, c.newer.ID} {
		var verified struct{ Verified bool }
		if x.json(t, &verified, "verify", id, "--store", x.store); !verified.Verified {
			t.Errorf("%s is not verified", id)
		}
	}
	r, w := x.restore(t, c.newer.ID, c.v.SerialPath())
	x.wantDrained(t, r, w, true)
}

// reseal puts the checksum of a changed manifest right, as the format says.
func reseal(b []byte) []byte {
	const tail = "\"\n}\n"
	digits := b[len(b)-len(tail)-16 : len(b)-len(tail)]
	copy(digits, "0000000000000000")
	copy(digits, fmt.Sprintf("%016x", xxhash.Sum64(b)))
	return b
}

// TestOtherWorlds: a manifest that is whole but of another time or machine is
// refused with a reason, and leaves nothing.
func TestOtherWorlds(t *testing.T) {
	dir := t.TempDir()
	bios, disk := filepath.Join(dir, "bios.bin"), filepath.Join(dir, "disk.raw")
	if err := copyFile(bios, "/usr/share/seabios/bios-256k.bin", 0o600); err != nil {
		vmtest.Skip(t, "seabios", "no firmware to copy: %v", err)
	}
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	c := newCrypt(t, "-bios", bios, "-drive", "if=none,id=d0,format=raw,readonly=on,file="+disk, "-device", "virtio-blk-pci,drive=d0")
	x := c.x
	manifest := filepath.Join(c.dir, "manifest.json")
	text, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	m, err := image.DecodeManifest(manifest, text)
	if err != nil {
		t.Fatal(err)
	}
	pc := m.Machine.Type
	edit := func(old, new string) func([]byte) []byte {
		return func(b []byte) []byte {
			if !bytes.Contains(b, []byte(old)) {
				t.Fatalf("no %q in the manifest:\n%s", old, b)
			}
			return reseal(bytes.ReplaceAll(b, []byte(old), []byte(new)))
		}
	}
	for _, k := range []struct {
		name, old, new string
		words          []string
		verify         int
		restore        []int
	}{
		{"from the future", `"version": 1,`, `"version": 2,`, []string{"version"}, exitRefused, []int{exitRefused}},
		{"of unknown needs", `"requires": [`, `"requires": [ "holograms",`, []string{"holograms"}, exitRefused, []int{exitRefused}},
		{"no such machine", pc, `pc-i440fx-99.9`, []string{"pc-i440fx-99.9"}, exitOK, []int{exitFailed, exitRefused}},
		{"another machine", pc, strings.Replace(pc, "i440fx", "q35", 1), nil, exitOK, []int{exitFailed, exitRefused, exitIntegrity}},
	} {
		t.Run(k.name, func(t *testing.T) {
			c.with(t, manifest, edit(k.old, k.new), func() {
				if k.verify == exitOK {
					x.json(t, new(listed), "verify", c.newer.ID, "--store", x.store)
				} else {
					x.fails(t, k.verify, k.words, "verify", c.newer.ID, "--store", x.store)
				}
				r := x.run(t, "restore", c.newer.ID, "--store", x.store, "--json")
				if !slices.Contains(k.restore, r.code) {
					t.Fatalf("want one of exit %v: %s", k.restore, r)
				}
				f := wantFailure(t, r, r.code, k.words...)
				if f.Hint == "" {
					t.Errorf("no hint: %+v", f)
				}
				t.Logf("exit %d: %s", r.code, f.Message)
				c.wantNothing(t)
			})
		})
	}
	for _, path := range []string{bios, disk} {
		t.Run("no "+filepath.Base(path), func(t *testing.T) {
			c.with(t, path, harms[0].do, func() {
				r := x.run(t, "restore", c.newer.ID, "--store", x.store, "--json")
				if r.code != exitFailed && r.code != exitRefused {
					t.Fatalf("want exit %d or %d: %s", exitFailed, exitRefused, r)
				}
				f := wantFailure(t, r, r.code, path)
				if f.Hint == "" {
					t.Errorf("no hint: %+v", f)
				}
				t.Logf("exit %d: %s", r.code, f.Message)
				c.wantNothing(t)
			})
		})
	}
	r, w := x.restore(t, c.newer.ID, c.v.SerialPath())
	x.wantDrained(t, r, w, true)
	x.wantOnly(t, c.older.ID, c.newer.ID)
}
