package diskcopy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm/disk"
)

// overlays has a checkpoint switch its drives to overlays.
func (b *bed) overlays(c *Config) { c.Overlay = &Overlay{Outside: b.vm.Process.Outside} }

// strays lists the files of overlays.
func (b *bed) strays() []string {
	b.t.Helper()
	found, err := filepath.Glob(filepath.Join(b.dir, "*.ckagent-*"))
	if err != nil {
		b.t.Fatal(err)
	}
	return found
}

func (b *bed) wantNoOverlay() {
	b.t.Helper()
	if left := b.strays(); len(left) > 0 {
		b.t.Errorf("overlays are left: %q", left)
	}
}

// wantOnDisk looks at the image from outside.
func (b *bed) wantOnDisk(path string, what string, args ...any) {
	b.t.Helper()
	out := run(b.t, "qemu-io", "-U", "-r", "-f", "qcow2", "-c", fmt.Sprintf(what, args...), path)
	if strings.Contains(out, "failed") {
		b.t.Errorf("%s: %s", path, out)
	}
}

// TestOverlayGivenUp: whatever ends a copy, what the guest wrote meanwhile is in its own
// image, and the next checkpoint continues the last good one.
func TestOverlayGivenUp(t *testing.T) {
	b := oneDisk(t, "64M")
	b.write(virtio, "write -P 5 0 64M")
	before := b.names()
	b.whole(virtio)
	b.write(virtio, "write -P 6 0 64M")
	w := b.begin(func(c *Config) { b.overlays(c); c.SpeedBytes = 1 << 20 })
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	// More than could be kept in memory, were there a limit.
	b.write(virtio, "write -P 77 1M 32M")
	if len(b.strays()) != 1 {
		t.Errorf("overlays %q", b.strays())
	}
	b.wantContinued(w, before)
	b.wantNoOverlay()
	b.wantOnDisk(b.dir+"/a", "read -P 77 1M 32M")
}

// TestOverlaySwept: what a dead agent left is committed, also if whoever does it is
// ended in the middle of that, and only once.
func TestOverlaySwept(t *testing.T) {
	b := oneDisk(t, "64M")
	b.write(virtio, "write -P 5 0 64M")
	before := b.names()
	w := b.begin(func(c *Config) { b.overlays(c); c.SpeedBytes = 1 << 20 })
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.write(virtio, "write -P 77 1M 32M")
	if _, refused, err := b.vm.DiskSources(t.Context()); err != nil || len(refused) == 0 || refused[0].Code != "checkpoint-left" {
		t.Errorf("with a checkpoint's overlay in use: %+v %v", refused, err)
	}
	// Somebody began to commit it, and ended.
	node := disk.OverlayNode(0)
	begin := map[string]any{"job-id": disk.CommitJob(0), "device": node, "top-node": node, "auto-dismiss": false, "speed": 1 << 20}
	if err := b.vm.QMP.Execute(t.Context(), "block-commit", begin, nil); err == nil {
		t.Error("a commit was begun while the image is being copied")
	}
	if err := b.vm.QMP.Execute(t.Context(), "block-job-cancel", map[string]any{"device": disk.CopyJob(0), "force": true}, nil); err != nil {
		t.Fatal(err)
	}
	b.awaitJob(disk.CopyJob(0), "concluded")
	if err := b.vm.QMP.Execute(t.Context(), "job-dismiss", map[string]any{"id": disk.CopyJob(0)}, nil); err != nil {
		t.Fatal(err)
	}
	if err := b.vm.QMP.Execute(t.Context(), "block-commit", begin, nil); err != nil {
		t.Fatal(err)
	}
	swept, err := b.vm.TakeOutLeftovers(t.Context())
	if err != nil || len(swept.Overlays) != 1 {
		t.Errorf("swept %+v %v", swept, err)
	}
	b.wantGraph(before)
	b.wantNoOverlay()
	b.wantOnDisk(b.dir+"/a", "read -P 77 1M 32M")
	if err := errors.Join(w.Drop(t.Context()), w.txn.Abort()); err != nil {
		t.Error(err)
	}
}

func (b *bed) awaitJob(id, status string) {
	b.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 2000 {
		jobs, err := disk.ReadJobs(b.t.Context(), b.vm.QMP)
		if err != nil {
			b.t.Fatal(err)
		}
		for _, j := range jobs {
			if j.ID == id && j.Status == status {
				return
			}
		}
		<-tick.C
	}
	b.t.Fatalf("job %s does not become %s", id, status)
}

// TestOverlayCommittedAlready: somebody died between the switch back and the removal of
// the overlay. What the overlay holds is old by then.
func TestOverlayCommittedAlready(t *testing.T) {
	b := oneDisk(t, "16M")
	before := b.names()
	w := b.begin(b.overlays)
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.write(virtio, "write -P 77 1M 1M")
	if err := w.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.awaitJob(disk.CopyJob(0), "concluded")
	if err := b.vm.QMP.Execute(t.Context(), "job-dismiss", map[string]any{"id": disk.CopyJob(0)}, nil); err != nil {
		t.Fatal(err)
	}
	node := disk.OverlayNode(0)
	if err := b.vm.QMP.Execute(t.Context(), "block-commit", map[string]any{"job-id": disk.CommitJob(0), "device": node, "top-node": node, "auto-dismiss": false}, nil); err != nil {
		t.Fatal(err)
	}
	b.awaitJob(disk.CommitJob(0), "ready")
	if err := b.vm.QMP.Execute(t.Context(), "job-complete", map[string]any{"id": disk.CommitJob(0)}, nil); err != nil {
		t.Fatal(err)
	}
	b.awaitJob(disk.CommitJob(0), "concluded")
	b.write(virtio, "write -P 78 1M 1M")
	swept, err := disk.Sweep(t.Context(), b.vm.QMP, false)
	if err != nil || len(swept.Overlays) != 0 {
		t.Errorf("swept %+v %v", swept, err)
	}
	b.wantGraph(before)
	b.wantNoOverlay()
	b.wantOnDisk(b.dir+"/a", "read -P 78 1M 1M")
	if err := errors.Join(w.Drop(t.Context()), w.txn.Abort()); err != nil {
		t.Error(err)
	}
}

// TestOverlayOfTheDead: a QEMU that ends leaves its last writes beside its image, where
// qemu-img commits them. Until then no checkpoint makes another overlay.
func TestOverlayOfTheDead(t *testing.T) {
	b := oneDisk(t, "16M")
	w := b.begin(func(c *Config) { b.overlays(c); c.SpeedBytes = 64 << 10 })
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.write(virtio, "write -P 77 1M 1M")
	// As its guest would have it safe.
	if err := b.vm.QMP.Execute(t.Context(), "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(b.vm.Process.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := b.vm.Process.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.Drop(t.Context()); err != nil {
		t.Logf("dropped: %v", err)
	}
	left := b.strays()
	if len(left) != 1 {
		t.Fatalf("overlays %q", left)
	}
	w.c.Overlay.Dir = b.dir // the process that saw it has ended
	if _, err := w.overlayFile(w.items[0]); !problem.Is(err, problem.Refused) || !strings.Contains(err.Error(), left[0]) {
		t.Errorf("with the overlay of a dead QEMU: %v", err)
	}
	run(t, "qemu-img", "commit", "-q", left[0])
	b.wantOnDisk(b.dir+"/a", "read -P 77 1M 1M")
	run(t, "qemu-img", "check", "-q", b.dir+"/a")
}

// TestOverlayWithoutRoom: refused before anything is touched, and given up before the
// guest's writes fail.
func TestOverlayWithoutRoom(t *testing.T) {
	b := oneDisk(t, "128M")
	small := filepath.Join(b.dir, "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=100m,mode=700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) })
	txn, err := b.store.Begin(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	there := func(c *Config) { b.overlays(c); c.Overlay.Dir, c.SpeedBytes = small, 256<<10 }
	c := Config{QMP: b.vm.QMP, Sources: b.sources(), Store: b.store, Txn: txn, VM: "vm"}
	there(&c)
	if _, err := Plan(t.Context(), c); !problem.Is(err, problem.Refused) || !strings.Contains(fmt.Sprint(err), "MiB free") {
		t.Errorf("a directory without room: %v", err)
	}
	if err := txn.Abort(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", unix.MS_REMOUNT, "size=140m"); err != nil {
		t.Fatal(err)
	}
	before := b.names()
	w := b.begin(there)
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.write(virtio, "write -P 77 0 90M")
	if err := w.Wait(t.Context()); !problem.Is(err, problem.Busy) || !strings.Contains(fmt.Sprint(err), "beside its overlay") {
		t.Errorf("room used up: %v", err)
	}
	if err := errors.Join(w.Drop(t.Context()), w.txn.Abort()); err != nil {
		t.Fatal(err)
	}
	b.wantGraph(before)
	b.wantOnDisk(b.dir+"/a", "read -P 77 0 90M")
}
