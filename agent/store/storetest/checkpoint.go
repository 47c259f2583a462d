package storetest

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/rand"
	"testing"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/store"
)

// Pages is how many pages of 4096 bytes the test checkpoints have.
const Pages = 48

// Content is the RAM and the device state of the test checkpoint of a seed.
func Content(seed int64) (ram, state []byte) {
	rnd := rand.New(rand.NewSource(seed))
	ram = make([]byte, Pages*4096)
	for p := range Pages {
		page := ram[p*4096 : (p+1)*4096]
		switch p % 3 {
		case 0: // zeros
		case 1:
			rnd.Read(page)
		default:
			for i := 0; i < len(page); i += 8 {
				binary.LittleEndian.PutUint64(page[i:], uint64(seed)+uint64(p))
			}
		}
	}
	state = make([]byte, 5000)
	rnd.Read(state)
	return ram, state
}

// Manifest is a plausible manifest without the parts a Writer fills in.
func Manifest() *image.Manifest {
	return &image.Manifest{Mode: "cow", Engine: "uffd",
		QEMU:    image.QEMU{Version: "7.2.22", BinaryPath: "/usr/bin/qemu-system-x86_64"},
		Machine: image.Machine{Type: "pc-i440fx-7.2", Accel: "tcg", Argv: []string{"qemu-system-x86_64", "-m", "256"}}}
}

// Blocks are the RAMBlocks of the test checkpoints.
func Blocks() []image.Block {
	return []image.Block{{Name: "pc.ram", UsedBytes: Pages * 4096, TotalBytes: Pages * 4096,
		PageBytes: 4096, Backing: "anonymous", Main: true}}
}

// Fill writes the files of a test checkpoint into a transaction and returns its
// manifest, ready for Commit.
func Fill(ctx context.Context, txn *store.Txn, seed int64, o image.WriterOptions) (*image.Manifest, error) {
	o.FS = txn.FS()
	w, err := image.NewWriter(txn.Dir(), Blocks(), o)
	if err != nil {
		return nil, err
	}
	defer w.Abort()
	ram, state := Content(seed)
	const step = 8 * 4096
	for off := 0; off < len(ram); off += step {
		if err := w.WritePages(0, uint64(off/4096), ram[off:off+step]); err != nil {
			return nil, err
		}
	}
	if err := w.WriteDeviceState(bytes.NewReader(state)); err != nil {
		return nil, err
	}
	s, err := w.Finish(ctx)
	if err != nil {
		return nil, err
	}
	m := Manifest()
	s.Apply(m)
	return m, nil
}

// Commit makes a whole test checkpoint and returns its id.
func Commit(t testing.TB, s *store.Store, vm string, seed int64) string {
	t.Helper()
	ctx := context.Background()
	txn, err := s.Begin(ctx, vm)
	if err != nil {
		t.Fatal(err)
	}
	m, err := Fill(ctx, txn, seed, image.WriterOptions{Compress: []string{"none", "s2", "zstd"}[seed%3]})
	if err == nil {
		err = txn.Commit(ctx, m)
	}
	if err != nil {
		txn.Abort()
		t.Fatal(err)
	}
	return txn.ID()
}

// Check reads a checkpoint back and compares every byte.
func Check(t testing.TB, s *store.Store, id string, seed int64) {
	t.Helper()
	ctx := context.Background()
	img, err := s.OpenImage(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	ram, state := Content(seed)
	got := make([]byte, len(ram))
	if _, err := img.ReadRun(0, 0, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, ram) {
		t.Errorf("checkpoint %s: RAM differs", id)
	}
	if got, err := img.DeviceState(ctx); err != nil || !bytes.Equal(got, state) {
		t.Errorf("checkpoint %s: device state differs: %v", id, err)
	}
	if err := img.Verify(ctx, nil); err != nil {
		t.Error(err)
	}
}
