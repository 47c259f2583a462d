package diskcopy

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/vm/disk"
	"github.com/ckagent/ckagent/tools/guest"
)

const virtio = "/machine/peripheral/v/virtio-backend"

// oneDisk is a machine with a qcow2 image on virtio-blk.
func oneDisk(t *testing.T, size string) *bed {
	return newBed(t, guest.QEMU{}, func(dir string) []string {
		return []string{"-drive", "if=none,id=d,format=qcow2,file=" + newQcow2(t, dir+"/a", size), "-device", "virtio-blk-pci,drive=d,id=v"}
	})
}

// whole takes a checkpoint from beginning to end.
func (b *bed) whole(device string) (volumes int, bytes uint64) {
	b.t.Helper()
	w := b.begin(nil)
	if err := w.Start(b.t.Context()); err != nil {
		b.t.Fatal(err)
	}
	b.write(device, "write -P 99 256k 64k")
	m := b.finish(w)
	return len(m.Disks[0].Volumes), m.Stats.DiskBytes
}

// TestSeveralDisks: one instant for all, and from the second checkpoint on only what
// changed, until a chain is long enough.
func TestSeveralDisks(t *testing.T) {
	b := newBed(t, guest.QEMU{}, func(dir string) []string {
		return []string{"-drive", "if=none,id=d0,format=qcow2,file=" + newQcow2(t, dir+"/a", "16M"), "-device", "virtio-blk-pci,drive=d0,id=v",
			"-device", "virtio-scsi-pci,id=bus", "-drive", "if=none,id=d1,format=raw,file=" + raw(t, dir+"/b", 8<<20), "-device", "scsi-hd,drive=d1,id=s",
			"-drive", "if=none,id=ro,readonly=on,format=raw,file=" + raw(t, dir+"/c", 1<<20), "-device", "virtio-blk-pci,drive=ro",
			"-drive", "if=ide,media=cdrom,format=raw,file=" + raw(t, dir+"/d", 1<<20)}
	})
	before := b.names()
	var first uint64
	for round := range FullEvery + 1 {
		b.write(virtio, "write -P %d %dk 64k", round+1, round*100)
		w := b.begin(nil)
		if err := w.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		b.write(virtio, "write -P 200 1M 1M")
		b.write("/machine/peripheral/s", "write -P 201 1M 1M")
		m := b.finish(w)
		b.wantGraph(before)
		want := round%FullEvery + 1
		if len(m.Disks) != 2 || len(m.Disks[0].Volumes) != want || len(m.Disks[1].Volumes) != want {
			t.Fatalf("round %d: %+v", round, m.Disks)
		}
		switch {
		case round == 0:
			first = m.Stats.DiskBytes
		case round < FullEvery && m.Stats.DiskBytes > first/2:
			t.Errorf("round %d wrote %d bytes, the first %d", round, m.Stats.DiskBytes, first)
		}
	}
	// Removing what others build on leaves those whole; the rest of it goes with them.
	list, err := b.store.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range list[:FullEvery-1] {
		if _, err := b.store.Remove(t.Context(), i.ID, true); err != nil {
			t.Fatal(err)
		}
	}
	for _, i := range list[FullEvery-1:] {
		if _, err := b.store.Verify(t.Context(), i.ID, nil); err != nil {
			t.Error(err)
		}
	}
	volumes := func() int {
		e, err := os.ReadDir(b.store.VolumeDir("vm"))
		if err != nil {
			t.Fatal(err)
		}
		return len(e)
	}
	if n := volumes(); n != 2*(FullEvery+1) {
		t.Errorf("%d volumes with the last of a chain there", n)
	}
	if _, err := b.store.Remove(t.Context(), list[FullEvery-1].ID, true); err != nil {
		t.Fatal(err)
	}
	if n := volumes(); n != 2 {
		t.Errorf("%d volumes after the chain's last checkpoint went", n)
	}
}

// wantContinued: a checkpoint that failed cost nothing: the graph is as it was, the
// next one continues the last good one and holds all that was written since.
func (b *bed) wantContinued(w *begun, before []string) {
	b.t.Helper()
	if err := errors.Join(w.Drop(b.t.Context()), w.txn.Abort()); err != nil {
		b.t.Fatal(err)
	}
	b.wantGraph(before)
	for _, m := range b.bitmaps() {
		if !strings.HasSuffix(m, "recording=true") {
			b.t.Errorf("bitmap %s", m)
		}
	}
	b.write(virtio, "write -P 111 0 64k")
	if n, _ := b.whole(virtio); n != 2 {
		b.t.Errorf("the next checkpoint has a chain of %d", n)
	}
}

// TestStoreFull: the copy fails, the guest does not notice.
func TestStoreFull(t *testing.T) {
	b := oneDisk(t, "64M")
	small := filepath.Join(b.dir, "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=12m,mode=700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) })
	var err error
	if b.store, err = store.Open(filepath.Join(small, "store")); err != nil {
		t.Fatal(err)
	}
	before := b.names()
	b.whole(virtio)
	b.write(virtio, "write -P 5 16M 24M")
	w := b.begin(nil)
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.write(virtio, "write -P 6 20M 1M")
	err = w.Wait(t.Context())
	if !problem.Is(err, problem.Store) {
		t.Errorf("copy to a full store: %v", err)
	}
	b.write(virtio, "write -P 7 20M 1M")
	if err := unix.Mount("tmpfs", small, "tmpfs", unix.MS_REMOUNT, "size=200m"); err != nil {
		t.Fatal(err)
	}
	b.wantContinued(w, before)
}

// TestMemoryUsedUp: a guest that overwrites more than was bargained for goes on, and
// the checkpoint is given up.
func TestMemoryUsedUp(t *testing.T) {
	b := oneDisk(t, "64M")
	b.write(virtio, "write -P 5 0 64M")
	before := b.names()
	b.whole(virtio)
	b.write(virtio, "write -P 6 0 64M")
	w := b.begin(func(c *Config) { c.MemoryBytes, c.SpeedBytes = minMemory, 1<<20 })
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i := range 8 {
		b.write(virtio, "write -P %d %dM 4M", 50+i, 63-4-7*i)
	}
	if err := w.Wait(t.Context()); !problem.Is(err, problem.Busy) || !strings.Contains(err.Error(), "--disk-memory") {
		t.Errorf("memory used up: %v", err)
	}
	b.wantContinued(w, before)
}

// TestCancelled: at any moment, and from outside.
func TestCancelled(t *testing.T) {
	b := oneDisk(t, "64M")
	b.write(virtio, "write -P 5 0 64M")
	before := b.names()
	b.whole(virtio)
	b.write(virtio, "write -P 6 0 64M")
	w := b.begin(func(c *Config) { c.SpeedBytes = 1 << 20 })
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := w.Wait(ctx); !problem.Is(err, problem.Cancelled) {
		t.Errorf("cancelled: %v", err)
	}
	b.wantContinued(w, before)
	b.write(virtio, "write -P 8 0 64M")
	w = b.begin(func(c *Config) { c.SpeedBytes = 1 << 20 })
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.vm.QMP.Execute(t.Context(), "block-job-cancel", map[string]any{"device": disk.CopyJob(0), "force": true}, nil); err != nil {
		t.Fatal(err)
	}
	if err := w.Wait(t.Context()); err == nil || problem.Is(err, problem.Cancelled) {
		t.Errorf("cancelled by somebody: %v", err)
	}
	if err := errors.Join(w.Drop(t.Context()), w.txn.Abort()); err != nil {
		t.Fatal(err)
	}
	b.wantGraph(before)
}

// graphText is all that QEMU says of its block layer, but for counters.
func (b *bed) graphText() string {
	b.t.Helper()
	var out []string
	for _, c := range []string{"query-block", "x-debug-query-block-graph", "query-jobs", "query-fdsets", "query-named-block-nodes"} {
		var v any
		if err := b.vm.QMP.Execute(b.t.Context(), c, nil, &v); err != nil {
			b.t.Fatal(err)
		}
		text, err := json.Marshal(v)
		if err != nil {
			b.t.Fatal(err)
		}
		out = append(out, string(text))
	}
	return strings.Join(out, "\n")
}

// TestSweep: whatever was under way, nothing of ours is left, and QEMU says of its
// block layer what it said before.
func TestSweep(t *testing.T) {
	b := oneDisk(t, "64M")
	b.write(virtio, "write -P 5 0 64M")
	before := b.graphText()
	b.whole(virtio)
	b.write(virtio, "write -P 6 0 64M")
	w := b.begin(func(c *Config) { c.SpeedBytes = 1 << 20 })
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.write(virtio, "write -P 7 0 1M")
	swept, err := disk.Sweep(t.Context(), b.vm.QMP, true)
	if err != nil || len(swept.Jobs) != 1 || len(swept.Filters) != 1 || len(swept.Nodes) != 4 || len(swept.Bitmaps) != 2 {
		t.Errorf("swept %+v %v", swept, err)
	}
	// Allocation grows with what the device wrote, and the firmware's driver chooses the
	// cache mode while it starts: neither is of the graph.
	strip := func(s string) string {
		var lines []string
		for _, part := range strings.Split(s, ",") {
			if !strings.Contains(part, "actual-size") && !strings.Contains(part, `"id":`) && !strings.Contains(part, "writeback") {
				lines = append(lines, part)
			}
		}
		return strings.Join(lines, ",\n")
	}
	if now := b.graphText(); strip(now) != strip(before) {
		t.Errorf("QEMU said\n%s\nand says\n%s", before, now)
	}
	if again, err := disk.Sweep(t.Context(), b.vm.QMP, true); err != nil || !again.Nothing() {
		t.Errorf("swept again: %+v %v", again, err)
	}
	if err := errors.Join(w.Drop(t.Context()), w.txn.Abort()); err != nil {
		t.Error(err)
	}
	if n, _ := b.whole(virtio); n != 1 {
		t.Errorf("without a bitmap the chain has %d volumes", n)
	}
}

// TestRefused: what would make a copy wrong is refused by name.
func TestRefused(t *testing.T) {
	for name, c := range map[string]struct {
		args   func(dir string) []string
		before func(b *bed) error
		code   string
	}{
		"somebody's job": {code: "job-active", before: func(b *bed) error {
			run(t, "qemu-img", "create", "-q", "-f", "raw", b.dir+"/target", "16M")
			return errors.Join(
				b.vm.QMP.Execute(t.Context(), "blockdev-add", map[string]any{"driver": "file", "node-name": "target", "filename": b.dir + "/target"}, nil),
				b.vm.QMP.Execute(t.Context(), "blockdev-mirror", map[string]any{"job-id": "theirs", "device": "d", "target": "target", "sync": "full", "speed": 1024}, nil))
		}},
		"an export": {code: "disk-exported", args: func(dir string) []string {
			return []string{"-drive", "if=none,id=d,format=raw,file=" + raw(t, dir+"/a", 1<<20), "-device", "virtio-blk-pci,drive=d,id=v,share-rw=on"}
		}, before: func(b *bed) error {
			return errors.Join(
				b.vm.QMP.Execute(t.Context(), "nbd-server-start", map[string]any{"addr": map[string]any{"type": "unix", "data": map[string]any{"path": b.dir + "/nbd"}}}, nil),
				b.vm.QMP.Execute(t.Context(), "block-export-add", map[string]any{"type": "nbd", "id": "e", "node-name": b.sourceRoot(), "writable": true}, nil))
		}},
		"encrypted": {code: "encrypted-disk", args: func(dir string) []string {
			encrypted(t, "qcow2", dir+"/e", "4M")
			return []string{"-object", "secret,id=s,data=x", "-drive", "if=none,id=d,format=qcow2,encrypt.key-secret=s,file=" + dir + "/e", "-device", "virtio-blk-pci,drive=d,id=v"}
		}},
		"two devices on one node": {code: "disk-shared", args: func(dir string) []string {
			return []string{"-blockdev", "driver=qcow2,node-name=n,file.driver=file,file.filename=" + newQcow2(t, dir+"/a", "8M"),
				"-device", "virtio-blk-pci,drive=n,id=v,share-rw=on", "-device", "virtio-scsi-pci,id=bus", "-device", "scsi-hd,drive=n,id=s,share-rw=on"}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			if c.args == nil {
				c.args = func(dir string) []string {
					return []string{"-drive", "if=none,id=d,format=qcow2,file=" + newQcow2(t, dir+"/a", "16M"), "-device", "virtio-blk-pci,drive=d,id=v"}
				}
			}
			b := newBed(t, guest.QEMU{}, c.args)
			if c.before != nil {
				if err := c.before(b); err != nil {
					t.Fatal(err)
				}
			}
			_, refused, err := b.vm.DiskSources(t.Context())
			if err != nil || len(refused) == 0 || refused[0].Code != c.code || refused[0].Advice == "" {
				t.Errorf("refused %+v %v, want %s", refused, err, c.code)
			}
			if all, err := b.vm.Refusals(t.Context()); err != nil || !slices.Contains(all, refused[0]) {
				t.Errorf("refusals %+v %v", all, err)
			}
		})
	}
}

func (b *bed) sourceRoot() string { return b.sources()[0].Root }
