package e2e

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// chainLength is how many checkpoints the chain gets (CKAGENT_E2E_CHAIN).
func chainLength(t testing.TB) int {
	t.Helper()
	s := os.Getenv("CKAGENT_E2E_CHAIN")
	if s == "" {
		return 8
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 4 {
		t.Fatalf("CKAGENT_E2E_CHAIN=%q: want a number from 4", s)
	}
	return n
}

// content is a digest of all of a checkpoint's memory.
func (x *tool) content(t testing.TB, id string) (sum [sha256.Size]byte) {
	t.Helper()
	r, err := image.OpenReader(x.dir(t, id))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	h := sha256.New()
	buf := make([]byte, 4<<20)
	for i, b := range r.Manifest().Blocks {
		for at := uint64(0); at < b.UsedBytes; at += uint64(len(buf)) {
			part := buf[:min(uint64(len(buf)), b.UsedBytes-at)]
			if _, err := r.ReadRun(i, at/pageBytes, part); err != nil {
				t.Fatal(err)
			}
			h.Write(part)
		}
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// TestChainOfCheckpoints takes a chain of a running guest, each compared with the memory
// at its instant; merges members at random, and kills every second merge at a random
// moment; removes members at random; and at last verifies and restores what is left,
// eagerly and lazily, with a merge running beside.
func TestChainOfCheckpoints(t *testing.T) {
	if testing.Short() {
		vmtest.Skip(t, "short", "takes and restores many checkpoints")
	}
	n := chainLength(t)
	x := newTool(t)
	b := newBedOf(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 8, SweepMS: 500, Rate: 2000, Idle: true})
	v, proxy := b.v, b.proxy
	var e explained
	x.json(t, &e, "explain", itoa(v.PID()))
	w := newWitness(t, v, b.control, e.Blocks)
	defer w.watch(proxy)()

	rnd := rand.New(rand.NewSource(1))
	want := map[string][sha256.Size]byte{}
	var ids []string
	stored, merged, killed, removed := uint64(0), 0, 0, 0
	for i := range n {
		v.WaitProgress(t, 50)
		c := x.checkpoint(t, v.PID(), "--qmp", "unix:"+proxy.Path(), "--mode", "cow", "--keep-last", "0", "--full-every", "1000", "--disks", "none")
		if i > 0 && (c.Parent != ids[len(ids)-1] || c.Unchanged == 0) {
			t.Errorf("checkpoint %d continues %q with %d pages unchanged, the newest is %s", i, c.Parent, c.Unchanged, ids[len(ids)-1])
		}
		w.mu.Lock()
		err := errors.Join(w.errs...)
		w.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.compare(x.dir(t, c.ID)); err != nil {
			t.Fatalf("checkpoint %d: %v", i, err)
		}
		stored += c.StoredBytes
		ids = append(ids, c.ID)
		want[c.ID] = x.content(t, c.ID)
		switch {
		case i%3 == 1:
			kill := (i/3)%2 == 1
			s := x.start(t, "merge", ids[rnd.Intn(len(ids))], "--store", x.store)
			if kill {
				timer := time.NewTimer(time.Duration(rnd.Intn(60)) * time.Millisecond)
				<-timer.C
				s.signal(unix.SIGKILL)
				killed++
			}
			if r := s.wait(t, runTimeout); r.code != exitOK && !kill {
				t.Fatal(r)
			}
			merged++
		case i%6 == 5 && len(ids) > 3:
			// Not the newest: the next one has to continue something.
			k := rnd.Intn(len(ids) - 1)
			if r := x.run(t, "rm", ids[k], "--store", x.store); r.code != exitOK {
				t.Fatal(r)
			}
			delete(want, ids[k])
			ids = append(ids[:k], ids[k+1:]...)
			removed++
		}
	}
	if r := x.run(t, "gc", "--store", x.store); r.code != exitOK {
		t.Fatal(r)
	}
	for _, id := range ids {
		if r := x.run(t, "verify", id, "--store", x.store); r.code != exitOK {
			t.Error(r)
		}
		if x.content(t, id) != want[id] {
			t.Errorf("checkpoint %s holds other memory than when it was taken", id)
		}
	}
	t.Logf("%d checkpoints, %d bytes stored in all; %d merges, %d of them killed; %d removed", n, stored, merged, killed, removed)
	v.Invariants()
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	for i, id := range ids {
		if n > 20 && i%5 != 0 && i != len(ids)-1 {
			continue // each was compared already
		}
		beside := x.start(t, "merge", ids[rnd.Intn(len(ids))], "--store", x.store)
		how := []string{"--lazy", "--eager"}[i%2]
		r, m := x.restore(t, id, v.SerialPath(), how, "--disks", "as-is")
		if b := beside.wait(t, runTimeout); b.code != exitOK && b.code != exitBusy {
			t.Error(fmt.Sprint("merge beside a restore: ", b))
		}
		x.wantUp(t, m)
		m.Kill()
		removeLater(r)
	}
	for _, id := range ids {
		if x.content(t, id) != want[id] {
			t.Errorf("checkpoint %s holds other memory after the merges", id)
		}
	}
	x.wantOnly(t, ids...)
}
