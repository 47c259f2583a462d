package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// mountStore puts the tool's store on a file system of its own of so many bytes.
func (x *tool) mountStore(t testing.TB, size string) {
	t.Helper()
	if err := os.MkdirAll(x.store, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("e2e-store", x.store, "tmpfs", 0, "mode=0700,size="+size); err != nil {
		if errors.Is(err, unix.EPERM) {
			vmtest.Skip(t, "mount", "no right to mount: %v", err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(x.store, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// fill takes all the space there is, and returns what gives it back.
func (x *tool) fill(t testing.TB) (release func()) {
	path := filepath.Join(x.store, "ballast")
	f, err := os.Create(path)
	if err != nil {
		t.Error(err)
		return func() {}
	}
	defer f.Close()
	chunk := make([]byte, 1<<20)
	for err == nil {
		_, err = f.Write(chunk)
	}
	for chunk, err = chunk[:4096], nil; err == nil; { // the rest of the last MiB
		_, err = f.Write(chunk)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("fill the store: %v", err)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	}
}

// seen counts a command on the wire.
func (b *bed) seen(command string) (n int) {
	for _, m := range b.proxy.Seen() {
		if !m.FromQEMU && m.Command == command {
			n++
		}
	}
	return n
}

// TestStoreFull: a store that is full, or gets full while it is written to, costs
// a checkpoint and nothing else.
func TestStoreFull(t *testing.T) {
	b := newBed(t)
	pid := itoa(b.v.PID())
	t.Run("before", func(t *testing.T) {
		x := newTool(t)
		x.mountStore(t, "4m")
		for _, mode := range []string{"cow", "buffer", "stop"} {
			f := x.fails(t, exitStore, []string{"free"}, "checkpoint", pid, "--store", x.store, "--qmp", b.proxy.Path(), "--mode", mode)
			if f.Hint == "" || !f.Retryable {
				t.Errorf("mode %s: %+v", mode, f)
			}
		}
		// Found before anything was asked for or armed.
		if b.seen("add-fd") != 0 || b.seen("stop") != 0 {
			t.Errorf("the VM was touched: %d add-fd, %d stop", b.seen("add-fd"), b.seen("stop"))
		}
		wantRunning(t, b.v)
		x.wantOnly(t)
	})
	t.Run("reserve", func(t *testing.T) {
		x := newTool(t)
		x.mountStore(t, "512m")
		x.fails(t, exitStore, []string{"must stay free"}, "checkpoint", pid, "--store", x.store, "--qmp", b.proxy.Path(), "--min-free", "500M")
		if b.seen("stop") != 0 {
			t.Error("the VM was stopped")
		}
		x.wantOnly(t)
	})
	t.Run("during", func(t *testing.T) {
		x := newTool(t)
		x.mountStore(t, "160m")
		first := x.checkpoint(t, b.v.PID(), "--qmp", b.v.QMPPath())
		for _, args := range [][]string{{"cow"}, {"buffer"}, {"stop"}, {"cow", "--compress", "s2"}} {
			b.reached.Store(0)
			release := func() {}
			remove := b.at("stop", func() { release = x.fill(t) })
			r := x.run(t, append([]string{"checkpoint", pid, "--store", x.store, "--qmp", b.proxy.Path(), "--json", "--mode"}, args...)...)
			remove()
			b.wantReached(t, 1)
			f := wantFailure(t, r, exitStore)
			if !strings.Contains(f.Message, "no space left") || f.Hint == "" {
				t.Errorf("%q: the error does not say what is missing and what to do: %+v", args, f)
			}
			if s := awaitState(t, b.control, "running"); s != "running" {
				t.Errorf("%q: the machine is %s", args, s)
			}
			x.wantNoProcess(t)
			wantRunning(t, b.v)
			// A full store can be looked at, and its checkpoints are whole.
			var verified struct{ Verified bool }
			if x.json(t, &verified, "verify", first.ID, "--store", x.store); !verified.Verified {
				t.Error("not verified")
			}
			release()
			x.wantOnly(t, first.ID)
		}
		c := x.checkpoint(t, b.v.PID(), "--qmp", b.v.QMPPath())
		x.wantOnly(t, c.ID, first.ID)
	})
	t.Run("read-only", func(t *testing.T) {
		x := newTool(t)
		x.mountStore(t, "160m")
		first := x.checkpoint(t, b.v.PID(), "--qmp", b.v.QMPPath())
		readOnly := func(flags uintptr) {
			if err := unix.Mount("", x.store, "", unix.MS_REMOUNT|flags, ""); err != nil {
				t.Fatal(err)
			}
		}
		readOnly(unix.MS_RDONLY)
		before := b.seen("stop")
		x.fails(t, exitStore, []string{"read-only"}, "checkpoint", pid, "--store", x.store, "--qmp", b.proxy.Path())
		if b.seen("stop") != before {
			t.Error("the VM was stopped")
		}
		if l := x.ls(t); len(l) != 1 || l[0].ID != first.ID || l[0].Damage != "" {
			t.Errorf("ls: %+v", l)
		}
		wantRunning(t, b.v)
		readOnly(0)
		x.wantOnly(t, first.ID)
	})
}
