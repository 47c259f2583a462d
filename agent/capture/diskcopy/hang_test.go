package diskcopy

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/vm/disk"
	"github.com/ckagent/ckagent/tools/torture/hangfs"
)

// hangingBed is a bed whose store can be made to hang. end lets what hangs go on.
func hangingBed(t *testing.T) (b *bed, fs *hangfs.Mounted, end func()) {
	b = oneDisk(t, "64M")
	below, path := filepath.Join(b.dir, "below"), filepath.Join(b.dir, "hang")
	if err := errors.Join(os.Mkdir(below, 0o700), os.Mkdir(path, 0o700)); err != nil {
		t.Fatal(err)
	}
	fs, err := hangfs.Mount(path, below)
	if err != nil {
		t.Fatal(err)
	}
	// What hangs goes on at once; the rest of it waits for those who have files open.
	ended := make(chan error, 1)
	end = sync.OnceFunc(func() { go func() { ended <- fs.Close() }() })
	t.Cleanup(func() {
		end()
		timer := time.NewTimer(10 * time.Second)
		defer timer.Stop()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-timer.C: // the machine still has files open, which is what the test is about
			t.Error("the store cannot be unmounted")
		}
	})
	if b.store, err = store.Open(filepath.Join(path, "store")); err != nil {
		t.Fatal(err)
	}
	return b, fs, end
}

// writesOn has the guest write, and reports how long the longest write took.
func (b *bed) writesOn() {
	b.t.Helper()
	longest := time.Duration(0)
	for i := range 40 {
		start := time.Now()
		b.write(virtio, "write -P %d %dM 1M", 100+i, i)
		longest = max(longest, time.Since(start))
	}
	b.t.Logf("the longest write of 1 MiB took %v while the store hung", longest)
	if longest > 5*time.Second { // a host that is busy is not a store that hangs
		b.t.Errorf("a write of 1 MiB took %v while the store hung", longest)
	}
}

// TestStoreHangs: a store that takes nothing any more, nor fails, costs the guest
// nothing; what could not be taken out at once goes when the store is back.
func TestStoreHangs(t *testing.T) {
	b, fs, end := hangingBed(t)
	b.write(virtio, "write -P 5 0 64M")
	before := b.names()
	w := b.begin(func(c *Config) { c.Stall, c.SpeedBytes = 300*time.Millisecond, 4<<20 })
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	fs.HangAfter(0)
	b.writesOn()
	if err := w.Wait(t.Context()); !problem.Is(err, problem.Store) {
		t.Errorf("copy to a store that hangs: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := disk.Sweep(ctx, b.vm.QMP, false); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("taken out of a store that hangs: %v", err)
	}
	b.write(virtio, "write -P 9 0 1M")
	end()
	if err := w.Drop(t.Context()); err != nil {
		t.Error(err)
	}
	b.wantGraph(before)
	b.write(virtio, "write -P 10 0 1M")
}

// TestStoreHangsBefore: no copy is started to a store that hangs already, for QEMU would
// ask it in the thread that serves the guest.
func TestStoreHangsBefore(t *testing.T) {
	b, fs, end := hangingBed(t)
	b.write(virtio, "write -P 5 0 64M")
	before := b.names()
	w := b.begin(func(c *Config) { c.Stall = 300 * time.Millisecond })
	fs.HangAfter(0)
	if err := w.Start(t.Context()); !problem.Is(err, problem.Store) {
		t.Fatalf("copy to a store that hangs: %v", err)
	}
	b.writesOn()
	end()
	if err := w.Drop(t.Context()); err != nil {
		t.Error(err)
	}
	b.wantGraph(before)
}
