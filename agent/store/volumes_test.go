package store

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
)

// diskStore is a store on disk with checkpoints of one VM whose disk is one chain.
type diskStore struct {
	*Store
	t     *testing.T
	chain []image.Volume
	ids   []string
}

func newDiskStore(t *testing.T, checkpoints int) *diskStore {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	d := &diskStore{Store: s, t: t}
	for range checkpoints {
		txn := d.begin()
		m := fill(t, txn, "none")
		d.chain = fillDisk(t, txn, m, d.chain)
		if err := txn.Commit(context.Background(), m); err != nil {
			t.Fatal(err)
		}
		d.ids = append(d.ids, txn.ID())
	}
	return d
}

func (d *diskStore) begin() *Txn {
	d.t.Helper()
	txn, err := d.Begin(context.Background(), "a")
	if err != nil {
		d.t.Fatal(err)
	}
	return txn
}

// volumes lists those that are there, oldest first.
func (d *diskStore) volumes() []string {
	d.t.Helper()
	entries, err := os.ReadDir(d.VolumeDir("a"))
	if err != nil && !os.IsNotExist(err) {
		d.t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func (d *diskStore) path(i int) string {
	return filepath.Join(d.VolumeDir("a"), image.VolumeName(d.ids[i], 0))
}

func (d *diskStore) wantVolumes(ids ...string) {
	d.t.Helper()
	var want []string
	for _, id := range ids {
		want = append(want, image.VolumeName(id, 0))
	}
	if got := d.volumes(); !slices.Equal(got, want) {
		d.t.Errorf("volumes %q, want %q", got, want)
	}
}

// TestVolumesOutliveTheirCheckpoint: a volume goes with the last checkpoint that is
// built on it.
func TestVolumesOutliveTheirCheckpoint(t *testing.T) {
	ctx := context.Background()
	d := newDiskStore(t, 3)
	if _, err := d.Remove(ctx, d.ids[0], false); err != nil {
		t.Fatal(err)
	}
	d.wantVolumes(d.ids...)
	if _, err := d.Verify(ctx, d.ids[1], nil); err != nil {
		t.Error(err)
	}
	if _, err := d.Remove(ctx, d.ids[2], false); err != nil {
		t.Fatal(err)
	}
	d.wantVolumes(d.ids[:2]...)
	if _, err := d.Remove(ctx, d.ids[1], true); err != nil {
		t.Fatal(err)
	}
	d.wantVolumes()
	if _, err := d.GC(ctx, GCOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Dir(d.VolumeDir("a"))); !os.IsNotExist(err) {
		t.Errorf("an empty VM's directory is left: %v", err)
	}
}

// TestVolumeOfWriter: what a live writer has begun is nobody's garbage, what a dead
// one left is.
func TestVolumeOfWriter(t *testing.T) {
	ctx := context.Background()
	d := newDiskStore(t, 1)
	txn := d.begin()
	fillDisk(t, txn, fill(t, txn, "none"), d.chain)
	if _, err := d.GC(ctx, GCOptions{}); err != nil {
		t.Fatal(err)
	}
	d.wantVolumes(d.ids[0], txn.ID())
	d.id.alive = func(int, uint64) bool { return false }
	rep, err := d.GC(ctx, GCOptions{DryRun: true})
	if err != nil || !slices.Contains(rep.Removed, filepath.Join("vms/a/disks", image.VolumeName(txn.ID(), 0))) {
		t.Errorf("gc would remove %q, %v", rep.Removed, err)
	}
	d.wantVolumes(d.ids[0], txn.ID())
	if _, err := d.GC(ctx, GCOptions{}); err != nil {
		t.Fatal(err)
	}
	d.wantVolumes(d.ids[0])
	txn = d.begin()
	fillDisk(t, txn, fill(t, txn, "none"), d.chain)
	if err := txn.Abort(); err != nil {
		t.Fatal(err)
	}
	d.wantVolumes(d.ids[0])
}

// TestVolumesOfDamaged: a manifest that cannot be read may name any volume.
func TestVolumesOfDamaged(t *testing.T) {
	ctx := context.Background()
	d := newDiskStore(t, 3)
	if err := os.WriteFile(manifestPath(filepath.Join(d.dir, vmsName, "a", d.ids[2])), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Remove(ctx, d.ids[1], true); err != nil {
		t.Fatal(err)
	}
	if _, err := d.GC(ctx, GCOptions{}); err != nil {
		t.Fatal(err)
	}
	d.wantVolumes(d.ids...)
}

// TestWrongVolumes: one that is gone, cut off, changed or of another checkpoint is
// damage to every checkpoint that needs it, and to no other.
func TestWrongVolumes(t *testing.T) {
	ctx := context.Background()
	for name, c := range map[string]struct {
		harm  func(t *testing.T, d *diskStore) error
		quick bool // found without reading it all
	}{
		"gone":    {func(_ *testing.T, d *diskStore) error { return os.Remove(d.path(1)) }, true},
		"cut off": {func(_ *testing.T, d *diskStore) error { return os.Truncate(d.path(1), 10) }, true},
		"changed": {func(t *testing.T, d *diskStore) error {
			data, err := os.ReadFile(d.path(1))
			if err != nil {
				return err
			}
			data[17] ^= 1
			return os.WriteFile(d.path(1), data, 0o600)
		}, false},
		"another's": {func(t *testing.T, d *diskStore) error {
			data, err := os.ReadFile(d.path(0))
			if err != nil {
				return err
			}
			return os.WriteFile(d.path(1), data, 0o600)
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDiskStore(t, 3)
			if err := c.harm(t, d); err != nil {
				t.Fatal(err)
			}
			for i, id := range d.ids {
				_, err := d.Verify(ctx, id, nil)
				if (i == 0) != (err == nil) || err != nil && !problem.Is(err, problem.Integrity) {
					t.Errorf("checkpoint %d: %v", i, err)
				}
			}
			sel, err := d.Get(ctx, "a", GetOptions{Deep: !c.quick})
			if err != nil || sel.Info.ID != d.ids[0] || len(sel.Skipped) != 2 {
				t.Errorf("newest that is whole: %+v %v", sel, err)
			}
		})
	}
}
