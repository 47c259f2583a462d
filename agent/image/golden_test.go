package image_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/store"
)

// The golden store was written once, by the first release of format 1, and is
// never written again: every later version has to read it.
//
//	go test ./agent/image -run TestWrittenByTheBook -golden-write DIR
//
// keeps one like it, for the next version of the format.
var goldenWrite = flag.String("golden-write", "", "write a golden store into this new directory")

const golden = "testdata/golden-v1"

// goldenSums are the SHA-256 of the contents, kept apart from the store.
type goldenSums map[string]map[string]string // VM -> block, or "device state" -> hex

func readSums(t *testing.T) goldenSums {
	t.Helper()
	data, err := os.ReadFile(golden + "/expected.json")
	if err != nil {
		t.Fatal(err)
	}
	var sums goldenSums
	if err := json.Unmarshal(data, &sums); err != nil {
		t.Fatal(err)
	}
	return sums
}

func sha(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

func TestGoldenIsReadable(t *testing.T) {
	sums := readSums(t)
	// A copy: reading takes leases, and the source tree may be read-only.
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(golden)); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	list, err := s.List(ctx)
	if err != nil || len(list) != len(sums) {
		t.Fatalf("%d checkpoints, %v", len(list), err)
	}
	for _, i := range list {
		if i.Damage != nil {
			t.Fatal(i.Damage)
		}
		sel, err := s.Get(ctx, "vm:"+i.VM, store.GetOptions{Deep: true})
		if err != nil || sel.Info.ID != i.ID {
			t.Fatalf("%+v, %v", sel, err)
		}
		img, err := s.OpenImage(ctx, i.ID)
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for n, b := range img.Manifest().Blocks {
			ram := make([]byte, b.UsedBytes)
			if _, err := img.ReadRun(n, 0, ram); err != nil {
				t.Fatal(err)
			}
			got[b.Name] = sha(ram)
		}
		state, err := img.DeviceState(ctx)
		if err != nil {
			t.Fatal(err)
		}
		got["device state"] = sha(state)
		if diff := cmp.Diff(sums[i.VM], got); diff != "" {
			t.Errorf("%s: %s", i.VM, diff)
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestGoldenByTheBook reads the golden store with a reader of its own, written
// after FORMAT.md: it keeps the page true.
func TestGoldenByTheBook(t *testing.T) {
	sums := readSums(t)
	dirs, err := filepath.Glob(golden + "/vms/*/*")
	if err != nil || len(dirs) != len(sums) {
		t.Fatalf("%v, %v", dirs, err)
	}
	kinds := map[uint64]int{}
	codecs := map[byte]int{}
	for _, dir := range dirs {
		vm, got, err := readByTheBook(dir, kinds, codecs)
		if err != nil {
			t.Fatalf("%s: %v", dir, err)
		}
		if diff := cmp.Diff(sums[vm], got); diff != "" {
			t.Errorf("%s: %s", vm, diff)
		}
	}
	for _, k := range []uint64{1, 2, 3} {
		if kinds[k] == 0 {
			t.Errorf("no page of kind %d", k)
		}
	}
	if codecs[1] == 0 || codecs[2] == 0 {
		t.Errorf("frames by codec: %v", codecs)
	}
}

func readByTheBook(dir string, kinds map[uint64]int, codecs map[byte]int) (string, map[string]string, error) {
	le := binary.LittleEndian
	raw, err := os.ReadFile(dir + "/manifest.json")
	if err != nil {
		return "", nil, err
	}
	zeroed := bytes.Clone(raw)
	digits := zeroed[len(zeroed)-20 : len(zeroed)-4]
	want := string(digits)
	copy(digits, "0000000000000000")
	if got := fmt.Sprintf("%016x", xxhash.Sum64(zeroed)); got != want || !bytes.HasSuffix(raw, []byte("\"\n}\n")) ||
		string(raw[len(raw)-41:len(raw)-20]) != `  "checksum": "xxh64:` {
		return "", nil, fmt.Errorf("manifest: %s, %s", got, want)
	}
	type file struct {
		Name, Kind string
		Bytes      int
		Checksum   string
		HeadBytes  int    `json:"head_bytes"`
		HeadSum    string `json:"head_checksum"`
	}
	var m struct {
		Format  string
		Version int
		VM      string
		Blocks  []struct {
			Name      string
			UsedBytes int `json:"used_bytes"`
			PageBytes int `json:"page_bytes"`
		}
		DeviceState file `json:"device_state"`
		Pagemap     file
		Segments    []file
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return "", nil, err
	}
	if m.Format != "ckagent-checkpoint" || m.Version != 1 {
		return "", nil, fmt.Errorf("format %s %d", m.Format, m.Version)
	}
	sum := func(b []byte) string { return fmt.Sprintf("xxh64:%016x", xxhash.Sum64(b)) }
	out := map[string]string{}
	state, err := os.ReadFile(dir + "/" + m.DeviceState.Name)
	if err != nil || len(state) != m.DeviceState.Bytes || sum(state) != m.DeviceState.Checksum {
		return "", nil, fmt.Errorf("device state: %v", err)
	}
	out["device state"] = sha(state)
	pm, err := os.ReadFile(dir + "/" + m.Pagemap.Name)
	if err != nil || len(pm) != m.Pagemap.Bytes || sum(pm[:m.Pagemap.HeadBytes]) != m.Pagemap.HeadSum || string(pm[:8]) != "CKPGMAP\x00" {
		return "", nil, fmt.Errorf("pagemap: %v", err)
	}
	var segs [][]byte
	for _, s := range m.Segments {
		b, err := os.ReadFile(dir + "/" + s.Name)
		if err != nil || len(b) != s.Bytes {
			return "", nil, fmt.Errorf("segment %s: %v", s.Name, err)
		}
		segs = append(segs, b)
	}
	entry, chunk := m.Pagemap.HeadBytes, 64+32*len(m.Blocks)
	for _, b := range m.Blocks {
		pages := b.UsedBytes / b.PageBytes
		var ram []byte
		for p := range pages {
			if p%1024 == 0 {
				n := min(1024, pages-p) * 16
				if le.Uint64(pm[chunk:]) != xxhash.Sum64(pm[entry:entry+n]) {
					return "", nil, fmt.Errorf("chunk at %d", entry)
				}
				chunk += 8
			}
			loc, want := le.Uint64(pm[entry:]), le.Uint64(pm[entry+8:])
			entry += 16
			page := make([]byte, b.PageBytes)
			kinds[loc>>61]++
			switch loc >> 61 {
			case 1:
			case 2:
				off := int(loc&(1<<48-1)) * 4096
				copy(page, segs[loc>>48&0x1fff][off:off+b.PageBytes])
			case 3:
				f := segs[loc>>48&0x1fff][int(loc&(1<<48-1)>>8)*64:]
				if string(f[:4]) != "CKF1" || xxhash.Sum64(f[:24]) != le.Uint64(f[24:]) {
					return "", nil, fmt.Errorf("frame header")
				}
				payload := f[32 : 32+le.Uint32(f[8:])]
				if xxhash.Sum64(payload) != le.Uint64(f[16:]) {
					return "", nil, fmt.Errorf("frame payload")
				}
				codecs[f[4]]++
				var content []byte
				if f[4] == 1 {
					content, err = s2.Decode(nil, payload)
				} else {
					var d *zstd.Decoder
					if d, err = zstd.NewReader(nil); err == nil {
						content, err = d.DecodeAll(payload, nil)
						d.Close()
					}
				}
				if err != nil || len(content) != int(f[5])<<f[6] {
					return "", nil, fmt.Errorf("frame content: %v", err)
				}
				copy(page, content[int(loc&0xff)*b.PageBytes:])
			default:
				return "", nil, fmt.Errorf("kind %d", loc>>61)
			}
			if xxhash.Sum64(page) != want {
				return "", nil, fmt.Errorf("block %s page %d", b.Name, p)
			}
			ram = append(ram, page...)
		}
		out[b.Name] = sha(ram)
	}
	return m.VM, out, nil
}

// TestWrittenByTheBook holds what this version writes against FORMAT.md.
func TestWrittenByTheBook(t *testing.T) {
	ctx := context.Background()
	root := *goldenWrite
	if root == "" {
		root = t.TempDir()
	}
	s, err := store.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	sums := goldenSums{}
	for n, codec := range []string{"none", "s2", "zstd"} {
		vm := "golden " + codec
		blocks := []image.Block{
			{Name: "pc.ram", UsedBytes: 1100 * 4096, TotalBytes: 1100 * 4096, PageBytes: 4096, Backing: "anonymous", Main: true},
			{Name: "/rom@etc/acpi/tables", UsedBytes: 3 * 4096, TotalBytes: 512 * 4096, PageBytes: 4096, GPA: -1, Backing: "anonymous", ReadOnly: true},
		}
		if codec != "none" {
			blocks = append(blocks, image.Block{Name: "huge", UsedBytes: 4 << 20, TotalBytes: 4 << 20, PageBytes: 2 << 20, GPA: 1 << 32, Backing: "hugetlb", Shared: true})
		}
		txn, err := s.Begin(ctx, vm)
		if err != nil {
			t.Fatal(err)
		}
		w, err := image.NewWriter(txn.Dir(), blocks, image.WriterOptions{Compress: codec})
		if err != nil {
			t.Fatal(err)
		}
		rnd := rand.New(rand.NewSource(int64(n)))
		sums[vm] = map[string]string{}
		for i, b := range blocks {
			ram := make([]byte, b.UsedBytes)
			for p := 0; p < len(ram); p += 4096 {
				switch {
				case b.PageBytes > 4096 && p < 1<<20:
					copy(ram[p:], strings.Repeat(fmt.Sprintf("huge %011d", p), 256))
				case b.PageBytes > 4096 || p > 12*4096 && p < 1020*4096:
				case p%(3*4096) == 0:
					rnd.Read(ram[p : p+64]) // compresses
				case p%(8*4096) == 4096:
					rnd.Read(ram[p : p+4096]) // does not
				}
			}
			if err := w.WritePages(i, 0, ram); err != nil {
				t.Fatal(err)
			}
			sums[vm][b.Name] = sha(ram)
		}
		state := make([]byte, 3000)
		rnd.Read(state)
		sums[vm]["device state"] = sha(state)
		if err := w.WriteDeviceState(bytes.NewReader(state)); err != nil {
			t.Fatal(err)
		}
		sum, err := w.Finish(ctx)
		if err != nil {
			t.Fatal(err)
		}
		m := &image.Manifest{CreatedAt: time.Date(2026, 11, 22, 12, 0, n, 345e6, time.UTC), Mode: "cow", Engine: "uffd", Writer: "ckagent 0.1",
			QEMU: image.QEMU{Version: "7.2.22", Package: "Debian 1:7.2+dfsg-7+deb12u18", BinaryPath: "/usr/bin/qemu-system-x86_64", SHA256: strings.Repeat("ab", 32)},
			Machine: image.Machine{Type: "pc-i440fx-7.2", Accel: "tcg", CPUModel: "qemu64,+x2apic", VCPUs: 2, UUID: "b2b54a07-7b1c-4b6c-9c0e-3d3d5f5f0001",
				RTC: "base=utc,clock=vm", Argv: []string{"qemu-system-x86_64", "-name", vm, "-object", "secret,id=s0,data=REDACTED"},
				Redacted: []string{"-object secret,id=s0,data"}, Env: []image.EnvVar{{Name: "QEMU_AUDIO_DRV", Value: "none"}},
				Changes: []string{"-device", "virtio-rng-pci"}, UID: 64055, GID: 64055, Groups: []int{64055}, Cwd: "/", Facts: map[string]string{"kernel": "6.1.0"}},
			GroupID: "group-1", Epoch: 7, Hot: image.HotRuns{{Block: 0, First: 3, Pages: 9}, {Block: 1, First: 0, Pages: 1}}}
		sum.Apply(m)
		m.Stats.PauseNS, m.Stats.ArmNS, m.Stats.DeviceStateNS, m.Stats.TotalNS, m.Stats.CapturedPages = 1_700_000, 300_000, 1_100_000, 600_000_000, 12
		if err := txn.Commit(ctx, m); err != nil {
			t.Fatal(err)
		}
		name, got, err := readByTheBook(txn.Dir(), map[uint64]int{}, map[byte]int{})
		if err != nil || name != vm {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(sums[vm], got); diff != "" {
			t.Error(diff)
		}
	}
	data, err := json.MarshalIndent(sums, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "expected.json"), append(data, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
}
