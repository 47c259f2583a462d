package faultserver

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/uffd/pagemap"
)

// TestMarksAreKeptBetweenCaptures takes capture after capture of memory of which a part is
// written all the time, and between two of them something else is written unseen, or
// discarded. What the marks say is the same as before is not read again; put together
// with the capture before, each is the memory at its freeze. When the last descriptor is
// closed, nothing is marked.
func TestMarksAreKeptBetweenCaptures(t *testing.T) {
	for _, c := range []struct {
		name string
		kind source.Kind
		huge bool
	}{{"anonymous", source.Anonymous, false}, {"huge pages", source.Anonymous, true}, {"memfd", source.Shared, false}} {
		t.Run(c.name, func(t *testing.T) {
			const pages, hot = 12*hugePages + 77, 1000
			g := newTarget(t, c.kind, pages, c.huge)
			g.writers.Go(func() { // one: it never rests
				rng := rand.New(rand.NewPCG(1, 7))
				for seq := uint64(0); !g.stop.Load(); seq++ {
					g.gate.RLock()
					g.write(rng.IntN(hot), seq)
					g.gate.RUnlock()
				}
			})
			defer g.end()
			discard := unix.MADV_DONTNEED
			if c.kind == source.Shared {
				discard = unix.MADV_REMOVE
			}
			var kept, first *os.File
			image := make([]byte, len(g.mem))
			for round := range 5 {
				switch round {
				case 2:
					if err := unix.Madvise(g.mem[5000*pageBytes:][:64*pageBytes], discard); err != nil {
						t.Fatal(err)
					}
				case 3: // and used again
					writeUnseen(t, g, 5001, 5002, 6000)
				}
				srv := startServer(t, g, func(o *Start) {
					with(Kernel)(o)
					o.Config.Keep, o.Config.Kept, o.Kept = true, round > 0, kept
				})
				if err := srv.Prearm(t.Context()); err != nil {
					t.Fatal(err)
				}
				if kept == nil {
					first = g.uffd
					var err error
					if kept, err = srv.Userfaultfd(); err != nil {
						t.Fatal(err)
					}
				}
				if err := srv.Rearm(t.Context()); err != nil {
					t.Fatal(err)
				}
				g.gate.Lock()
				want := bytes.Clone(g.mem)
				err := srv.Freeze(t.Context())
				g.gate.Unlock()
				if err := errors.Join(err, srv.Scan()); err != nil {
					t.Fatal(err)
				}
				n, err := drainAll(t, srv, image)
				if err != nil || n != pages {
					t.Fatalf("round %d: %d pages of %d, %v", round, n, pages, err)
				}
				for p := range pages {
					if got, was := image[p*pageBytes:][:pageBytes], want[p*pageBytes:][:pageBytes]; !bytes.Equal(got, was) {
						t.Fatalf("round %d: page %d differs: %x, was %x", round, p, got[:16], was[:16])
					}
				}
				same := srv.Stats().SamePages
				if known := round > 0 && c.kind == source.Anonymous; known != (same > 0) || known && same < pages-hot-1000 {
					t.Errorf("round %d: %d pages were known to be the same: %+v", round, same, srv.Stats())
				}
				if err := srv.Close(); err != nil {
					t.Error(err)
				}
			}
			// The test itself holds one more.
			if err := errors.Join(kept.Close(), first.Close()); err != nil {
				t.Error(err)
			}
			pm, err := pagemap.OpenSelf()
			if err != nil {
				t.Fatal(err)
			}
			defer pm.Close()
			var regions [16]pagemap.Region
			start := g.address()
			if err := pm.Armed(start, start+pages*pageBytes, regions[:], func(r pagemap.Region) bool {
				t.Errorf("still marked: %+v", r)
				return false
			}); err != nil {
				t.Error(err)
			}
		})
	}
}
