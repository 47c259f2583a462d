package vm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// checkLayout holds a layout against the machine, by QEMU's own account of its
// memory: what pmemsave writes of a page must be what lies at the address found.
func checkLayout(t *testing.T, tgt *Target, blocks []RAMBlock) {
	t.Helper()
	mem, err := os.OpenFile(tgt.Process.Path("mem"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	dump := filepath.Join(t.TempDir(), "page")
	seen := make(map[uint64]string)
	for _, b := range blocks {
		if other, ok := seen[b.HVA]; ok {
			t.Errorf("%s and %s at one address", b.Name, other)
		}
		seen[b.HVA] = b.Name
		if len(b.VMAs) == 0 || b.VMAs[0].Start != b.HVA || b.VMAs[len(b.VMAs)-1].End < b.HVA+b.TotalBytes {
			t.Errorf("%s: mappings %+v do not cover it", b.Name, b.VMAs)
		}
		for _, r := range b.Ranges {
			// The last page of the range: an offset that is off shows there.
			at, gpa := b.HVA+r.Offset+r.Bytes-4096, r.GPA+r.Bytes-4096
			want := make([]byte, 4096)
			if b.Main {
				copy(want, fmt.Sprintf("%s@%x", b.Name, gpa))
				for i := 512; i < len(want); i += 8 {
					want[i] = byte(i) ^ byte(gpa>>12)
				}
				if _, err := mem.WriteAt(want, int64(at)); err != nil {
					t.Fatalf("%s: write at %#x: %v", b.Name, at, err)
				}
			} else if _, err := mem.ReadAt(want, int64(at)); err != nil {
				t.Fatalf("%s: read at %#x: %v", b.Name, at, err)
			}
			if out, err := tgt.QMP.HMP(t.Context(), fmt.Sprintf("pmemsave 0x%x 4096 \"%s\"", gpa, dump)); err != nil || strings.TrimSpace(out) != "" {
				t.Fatalf("pmemsave: %v %s", err, out)
			}
			got, err := os.ReadFile(dump)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s: guest page %#x is not at %#x (found by %s)", b.Name, gpa, at, b.How)
			}
		}
	}
}

// withoutHow strips what a fast resolution does not have to know.
func withoutHow(blocks []RAMBlock) []RAMBlock {
	out := slices.Clone(blocks)
	for i := range out {
		out[i].VMAs, out[i].How = nil, ""
	}
	return out
}

type layoutCase struct {
	name   string
	args   []string
	check  func(t *testing.T, tgt *Target, b map[string]RAMBlock)
	expect map[string]Backing
	refuse []string
}

func layoutCases(t *testing.T) []layoutCase {
	dir := t.TempDir()
	shm, err := os.MkdirTemp("/dev/shm", "ckvm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(shm) })
	var nics []string
	for range 12 {
		nics = append(nics, "-device", "virtio-net-pci")
	}
	cases := []layoutCase{
		{name: "pc", args: []string{"-M", "pc", "-m", "1024"}, expect: map[string]Backing{"pc.ram": Anonymous}},
		{name: "q35 two vCPUs", args: []string{"-M", "q35", "-m", "512", "-smp", "2"}, expect: map[string]Backing{"pc.ram": Anonymous}},
		{name: "twelve virtio", args: append([]string{"-M", "q35", "-m", "256"}, nics...), expect: map[string]Backing{"pc.ram": Anonymous}},
		{name: "memfd", args: []string{"-M", "pc,memory-backend=m", "-m", "256", "-object", "memory-backend-memfd,id=m,size=256M,share=on"},
			expect: map[string]Backing{"m": Memfd}},
		{name: "private file on tmpfs", args: []string{"-M", "pc,memory-backend=m", "-m", "128", "-object", "memory-backend-file,id=m,size=128M,share=off,mem-path=" + shm + "/a"},
			expect: map[string]Backing{"m": PrivateFile}},
		{name: "shared file on tmpfs", args: []string{"-M", "pc,memory-backend=m", "-m", "128", "-object", "memory-backend-file,id=m,size=128M,share=on,mem-path=" + shm + "/b"},
			expect: map[string]Backing{"m": SharedFile}},
		{name: "private file on disk", args: []string{"-M", "pc,memory-backend=m", "-m", "64", "-object", "memory-backend-file,id=m,size=64M,share=off,mem-path=" + dir + "/c"},
			expect: map[string]Backing{"m": PrivateFile},
			check: func(t *testing.T, tgt *Target, b map[string]RAMBlock) {
				m := b["m"]
				if ok, why := m.CanWriteProtect(); ok && m.FileType != "tmpfs" || !ok && why == "" {
					t.Errorf("on %s: write protection %v %q", m.FileType, ok, why)
				}
			}},
		{name: "prealloc", args: []string{"-M", "pc,memory-backend=m", "-m", "64", "-object", "memory-backend-ram,id=m,size=64M,prealloc=on"},
			expect: map[string]Backing{"m": Anonymous},
			check: func(t *testing.T, tgt *Target, b map[string]RAMBlock) {
				if m := b["m"]; m.VMAs[0].RSSBytes < 64<<20 {
					t.Errorf("preallocated, yet %d bytes present", m.VMAs[0].RSSBytes)
				}
			}},
		{name: "split at 4 GiB", args: []string{"-M", "q35", "-m", "5120"}, expect: map[string]Backing{"pc.ram": Anonymous},
			check: func(t *testing.T, tgt *Target, b map[string]RAMBlock) {
				i := slices.IndexFunc(b["pc.ram"].Ranges, func(r GPARange) bool { return r.GPA == 4<<30 })
				if i < 0 || b["pc.ram"].Ranges[i].Offset == 0 {
					t.Errorf("no range above 4 GiB: %+v", b["pc.ram"].Ranges)
				}
			}},
		{name: "DIMM", args: []string{"-M", "pc", "-m", "128,slots=2,maxmem=2G", "-object", "memory-backend-ram,id=d1,size=128M", "-device", "pc-dimm,id=dimm1,memdev=d1"},
			expect: map[string]Backing{"pc.ram": Anonymous, "d1": Anonymous}},
		{name: "two NUMA nodes", args: []string{"-M", "q35", "-m", "256", "-smp", "2", "-object", "memory-backend-ram,id=n0,size=128M", "-object", "memory-backend-ram,id=n1,size=128M",
			"-numa", "node,memdev=n0", "-numa", "node,memdev=n1"}, expect: map[string]Backing{"n0": Anonymous, "n1": Anonymous}},
		{name: "ivshmem", args: []string{"-M", "q35", "-m", "128", "-object", "memory-backend-file,id=iv,size=1M,share=on,mem-path=" + shm + "/iv", "-device", "ivshmem-plain,memdev=iv"},
			refuse: []string{"migration-blocker"}, // a peer; a master may be saved
			check: func(t *testing.T, tgt *Target, b map[string]RAMBlock) {
				for name, blk := range b {
					if strings.HasSuffix(name, "/iv") && (blk.Backing != SharedFile || blk.FileType != "tmpfs" || !blk.Main) {
						t.Errorf("ivshmem: %+v", blk)
					}
				}
			}},
	}
	if _, err := os.Stat("/usr/share/OVMF/OVMF_CODE_4M.fd"); err == nil {
		cases = append(cases, layoutCase{name: "pflash", args: []string{"-M", "q35", "-m", "128",
			"-drive", "if=pflash,format=raw,unit=0,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd",
			"-drive", "if=pflash,format=raw,unit=1,file=" + copied(t, dir, "/usr/share/OVMF/OVMF_VARS_4M.fd")},
			expect: map[string]Backing{"pc.ram": Anonymous, "system.flash0": Anonymous, "system.flash1": Anonymous}})
	}
	return cases
}

func TestLayout(t *testing.T) {
	for _, b := range builds(t) {
		for _, c := range layoutCases(t) {
			t.Run(b.name+"/"+c.name, func(t *testing.T) {
				tgt := openQEMU(t, b, append([]string{"-S"}, c.args...)...)
				start := time.Now()
				blocks, err := tgt.Layout(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				full := time.Since(start)
				by := make(map[string]RAMBlock)
				hows := make(map[string]int)
				for _, blk := range blocks {
					by[blk.Name] = blk
					hows[blk.How]++
				}
				for name, backing := range c.expect {
					if by[name].Backing != backing || by[name].Main == strings.HasPrefix(name, "system.") {
						t.Errorf("%s: %+v", name, by[name])
					}
				}
				if c.check != nil {
					c.check(t, tgt, by)
				}
				checkLayout(t, tgt, blocks)
				start = time.Now()
				again, err := ResolveLayout(t.Context(), tgt.Process, tgt.QMP, blocks)
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("%d blocks %v: %v, with hints %v", len(blocks), hows, full, time.Since(start))
				if got, want := fmt.Sprintf("%+v", withoutHow(again)), fmt.Sprintf("%+v", withoutHow(blocks)); got != want {
					t.Errorf("with hints %s, without %s", got, want)
				}
				if r, err := tgt.Refusals(t.Context()); err != nil || !slices.Equal(codes(r), c.refuse) {
					t.Errorf("refusals %+v, %v", r, err)
				}
				m, err := tgt.Describe(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if len(m.Changes)+len(m.Refusals) != 0 {
					t.Errorf("an untouched machine differs: %+v %+v", m.Changes, m.Refusals)
				}
			})
		}
	}
}

// TestLayoutMethods takes one method after the other away and wants the same
// answer or a refusal, never another answer.
func TestLayoutMethods(t *testing.T) {
	for _, b := range builds(t) {
		t.Run(b.name, func(t *testing.T) {
			tgt := openQEMU(t, b, "-S", "-M", "q35", "-m", "64", "-device", "virtio-net-pci", "-device", "virtio-net-pci")
			want, err := tgt.Layout(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			text, err := tgt.QMP.HMP(t.Context(), "info ramblock")
			if err != nil {
				t.Fatal(err)
			}
			lines, err := parseRAMBlocks(text)
			if err != nil {
				t.Fatal(err)
			}
			vmas, err := tgt.Process.ReadSmaps()
			if err != nil {
				t.Fatal(err)
			}
			for i := range lines {
				lines[i].hva = 0
			}
			check := func(t *testing.T, r *resolver, all bool) {
				t.Helper()
				for _, w := range want {
					got, ok := r.host[w.Name]
					if ok && got != w.HVA && r.how[w.Name] != HowContent {
						t.Errorf("%s by %s: %#x, want %#x", w.Name, r.how[w.Name], got, w.HVA)
					}
					if !ok && all {
						t.Errorf("%s not found", w.Name)
					}
				}
			}
			fresh := func() *resolver {
				return &resolver{p: tgt.Process, q: tgt.QMP, lines: lines, vmas: vmas, host: map[string]uint64{}, how: map[string]string{}}
			}
			r := fresh()
			if err := r.claimDirect(); err != nil {
				t.Fatal(err)
			}
			check(t, r, true)
			r = fresh()
			if _, err := r.claimMapped(t.Context()); err != nil {
				t.Fatal(err)
			}
			if r.how["pc.ram"] != HowGPA {
				t.Errorf("pc.ram by %q", r.how["pc.ram"])
			}
			check(t, r, false)
			// The NICs' ROMs are three of a size (with the board's); two hold the
			// same bytes, the third does not, so that without QEMU's records they
			// cannot be told apart.
			if err := r.claimBySize(); !errors.Is(err, errAmbiguous) {
				t.Errorf("ambiguous blocks: %v", err)
			}
			check(t, r, false)
		})
	}
}

func TestLayoutUnderKVM(t *testing.T) {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no KVM here: %v", err)
	}
	f.Close()
	for _, b := range builds(t) {
		t.Run(b.name, func(t *testing.T) {
			tgt := openQEMU(t, b, "-S", "-accel", "kvm", "-M", "pc", "-m", "5120")
			if tgt.Accel != "kvm" {
				t.Errorf("accelerator %q", tgt.Accel)
			}
			blocks, err := tgt.Layout(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			checkLayout(t, tgt, blocks)
			if r, err := tgt.Refusals(t.Context()); err != nil || len(r) != 0 {
				t.Errorf("refusals %+v %v", r, err)
			}
			m, err := tgt.Describe(t.Context())
			if err != nil || len(m.Changes)+len(m.Refusals) != 0 {
				t.Errorf("%+v %+v %v", m.Changes, m.Refusals, err)
			}
		})
	}
}
