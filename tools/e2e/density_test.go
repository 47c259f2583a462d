package e2e

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestDensity keeps several VMs of one distribution in one store and measures what that
// takes: as fulls, with content shared within a tenant, compressed, both. With
// CKAGENT_E2E_DENSITY=1 it is four Linux guests, with restic of raw dumps of the same
// instant beside; otherwise two small ones, to see that VMs of a tenant share and others
// do not.
func TestDensity(t *testing.T) {
	if testing.Short() {
		vmtest.Skip(t, "short", "takes checkpoints of several guests")
	}
	cfg, n := vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 8, Rate: 100, Control: true}, 2
	campaign := os.Getenv("CKAGENT_E2E_DENSITY") != ""
	if campaign {
		cfg, n = vmtest.Config{MemoryMiB: 512, WSMiB: 64, Rate: 100, Control: true}, 4
	}
	x := newTool(t)
	root := x.store
	var vms []*vmtest.VM
	for range n {
		v := vmtest.Start(t, cfg)
		v.WaitProgress(t, 50)
		vms = append(vms, v)
		if err := monitor(t, v.ControlPath()).Execute(t.Context(), "stop", nil, nil); err != nil {
			t.Fatal(err) // so that every way meets the same content
		}
	}
	take := func(way string, args ...string) (stored, shared uint64, ids []string) {
		x.store = root + "-" + way
		for _, v := range vms {
			c := x.checkpoint(t, v.PID(), append([]string{"--disks", "none", "--parent", "none"}, args...)...)
			stored, shared, ids = stored+c.StoredBytes, shared+c.Shared, append(ids, c.ID)
		}
		return stored, shared, ids
	}
	fulls, none, ids := take("full")
	apart, _, _ := take("apart", "--dedup")
	tenant, shared, kept := take("tenant", "--tenant", "a")
	packed, _, _ := take("zstd", "--compress", "zstd")
	both, _, bothIDs := take("both", "--tenant", "a", "--compress", "zstd")
	for i, id := range bothIDs {
		if r := x.run(t, "verify", id, "--store", x.store); r.code != exitOK {
			t.Error(r)
		}
		if i == 0 { // the others keep what they share with it
			if r := x.run(t, "rm", "--force", id, "--store", x.store); r.code != exitOK {
				t.Error(r)
			}
		}
	}
	if none != 0 || shared == 0 || tenant >= apart || len(kept) != n {
		t.Errorf("%d pages shared without being told to, %d within a tenant, %d bytes, %d apart", none, shared, tenant, apart)
	}
	share := func(b uint64) float64 { return 100 * float64(b) / float64(fulls) }
	t.Logf("%d VMs: fulls %d bytes; --dedup %d (%.1f %%), --tenant %d (%.1f %%), --compress zstd %d (%.1f %%), both %d (%.1f %%)",
		n, fulls, apart, share(apart), tenant, share(tenant), packed, share(packed), both, share(both))
	if !campaign {
		return
	}
	x.store = root + "-full"
	dumps := filepath.Join(filepath.Dir(root), "dumps")
	if err := os.Mkdir(dumps, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		if r := x.run(t, "export", id, "--store", x.store, "--format", "raw", "--output", filepath.Join(dumps, id)); r.code != exitOK {
			t.Fatal(r)
		}
	}
	repo := filepath.Join(filepath.Dir(root), "restic")
	for _, args := range [][]string{{"init"}, {"backup", dumps}} {
		c := exec.Command("restic", append([]string{"-r", repo, "--no-cache"}, args...)...)
		c.Env = append(os.Environ(), "RESTIC_PASSWORD=x")
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("restic %v: %v\n%s", args, err, out)
		}
	}
	peer := treeBytes(t, repo)
	t.Logf("restic of raw dumps: %d bytes (%.1f %%); both against it %.2f", peer, share(peer), float64(both)/float64(peer))
}

// treeBytes is the size of all files below a directory.
func treeBytes(t testing.TB, dir string) (sum uint64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			sum += uint64(info.Size())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return sum
}
