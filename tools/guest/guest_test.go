package guest

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Several builders of one artifact: one builds, all get the same directory, and
// it is never seen half done.
func TestArtifactBuildsOnce(t *testing.T) {
	t.Setenv("CKAGENT_CACHE", t.TempDir())
	var wg sync.WaitGroup
	var mu sync.Mutex
	builds, dirs := 0, map[string]bool{}
	for range 8 {
		wg.Go(func() {
			dir, err := artifact(t.Context(), "thing", "1", func(dir string) error {
				mu.Lock()
				builds++
				mu.Unlock()
				return os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o644)
			})
			if err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(filepath.Join(dir, "file")); err != nil {
				t.Error(err)
			}
			mu.Lock()
			dirs[dir] = true
			mu.Unlock()
		})
	}
	wg.Wait()
	if builds != 1 || len(dirs) != 1 {
		t.Fatalf("%d builds in %d directories", builds, len(dirs))
	}
}

// A build that fails leaves nothing that the next one takes for complete, and a
// changed stamp makes another artifact.
func TestArtifactFailsCleanly(t *testing.T) {
	cache := t.TempDir()
	t.Setenv("CKAGENT_CACHE", cache)
	boom := errors.New("boom")
	if _, err := artifact(t.Context(), "thing", "1", func(dir string) error {
		if err := os.WriteFile(filepath.Join(dir, "half"), nil, 0o644); err != nil {
			t.Error(err)
		}
		return boom
	}); !errors.Is(err, boom) {
		t.Fatalf("got %v", err)
	}
	if names, _ := filepath.Glob(filepath.Join(cache, "*")); len(names) != 1 || filepath.Base(names[0]) != ".thing.lock" {
		t.Fatalf("left behind: %q", names)
	}
	ok := func(string) error { return nil }
	one, err1 := artifact(t.Context(), "thing", "1", ok)
	two, err2 := artifact(t.Context(), "thing", "2", ok)
	if err1 != nil || err2 != nil || one == two {
		t.Fatalf("%q %v, %q %v", one, err1, two, err2)
	}
}

func TestLockGivesUpWithItsContext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := lock(ctx, path); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	unlock()
	if unlock, err = lock(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	unlock()
}

func TestSourcesOfTheReleaseOnly(t *testing.T) {
	list := `# deb http://archive.example/x commented main
deb http://archive.example/debian tree main contrib
deb [arch=amd64 signed-by=/k.gpg] http://archive.example/debian tree-updates main
deb http://other.example/apt cloud-tree main
deb-src http://archive.example/debian tree main
deb http://archive.example/debian tree contrib
`
	got := parseList(list, "tree")
	want := []source{{"", "http://archive.example/debian", "tree"},
		{"arch=amd64 signed-by=/k.gpg", "http://archive.example/debian", "tree-updates"}}
	if !slices.Equal(got, want) {
		t.Errorf("list: %+v", got)
	}
	deb822 := `Types: deb deb-src
# a comment
URIs: http://archive.example/debian
Suites: tree tree-updates tree-backports
Components: main non-free
Signed-By: /usr/share/keyrings/k.gpg

Types: deb
URIs: http://archive.example/security
Suites: tree-security
Components: main

Types: deb
URIs: http://other.example/
Suites: nodistro
Components: main

Enabled: no
Types: deb
URIs: http://disabled.example/
Suites: tree
Components: main
`
	got = parseSources(deb822, "tree")
	want = []source{{"signed-by=/usr/share/keyrings/k.gpg", "http://archive.example/debian", "tree"},
		{"signed-by=/usr/share/keyrings/k.gpg", "http://archive.example/debian", "tree-updates"},
		{"", "http://archive.example/security", "tree-security"}}
	if !slices.Equal(got, want) {
		t.Errorf("deb822: %+v", got)
	}
}

// The real thing: every artifact there is, and what is promised of it.
func TestLinux(t *testing.T) {
	image, err := Linux(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := os.ReadFile(image.Kernel)
	if err != nil {
		t.Fatal(err)
	}
	if !hasPVHNote(kernel) {
		t.Error("the kernel has no PVH note")
	}
	if b, err := os.ReadFile(image.BzImage); err != nil || string(b[0x202:0x206]) != "HdrS" {
		t.Errorf("no bzImage: %v", err)
	}
	out, err := exec.CommandContext(t.Context(), "cpio", "-t", "--quiet", "-F", image.Initrd).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{"init", "bin/busybox", "mods/list", "mods/virtio_net.ko", "mods/virtio_pci.ko", "dev/console"} {
		if !slices.Contains(strings.Fields(string(out)), want) {
			t.Errorf("the initramfs lacks %s", want)
		}
	}
	again, err := Linux(t.Context())
	if err != nil || again != image {
		t.Errorf("a second build went elsewhere: %+v %v", again, err)
	}
}

func TestMini(t *testing.T) {
	path, err := Mini(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Class != elf.ELFCLASS32 || f.Machine != elf.EM_386 {
		t.Errorf("%v %v", f.Class, f.Machine)
	}
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	magic := binary.LittleEndian.AppendUint32(nil, 0x1badb002)
	if at := bytes.Index(image, magic); at < 0 || at > 8192 || at%4 != 0 {
		t.Errorf("multiboot header at %d", at)
	}
}

func TestOVMF(t *testing.T) {
	fw, err := OVMF(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var sum int64
	for _, path := range []string{fw.Code, fw.Vars} {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		sum += st.Size()
	}
	if sum != 4<<20 {
		t.Errorf("code and variables have %d bytes together", sum)
	}
}

func TestLZ4(t *testing.T) {
	// One block: "abc", then a match of 9 at -3 that overlaps what it makes,
	// then the literals "xyz" that end it.
	block := []byte{0x35, 'a', 'b', 'c', 3, 0, 0x30, 'x', 'y', 'z'}
	frame := binary.LittleEndian.AppendUint32(nil, lz4LegacyMagic)
	frame = binary.LittleEndian.AppendUint32(frame, uint32(len(block)))
	frame = append(frame, block...)
	frame = append(frame, 0xff, 0xff, 0xff, 0x7f) // no block header: the end
	got, err := unlz4Legacy(frame, 1000)
	if err != nil || string(got) != "abcabcabcabcxyz" {
		t.Fatalf("%q %v", got, err)
	}
	if _, err := unlz4Legacy(frame, 10); !errors.Is(err, errLZ4) {
		t.Errorf("beyond the limit: %v", err)
	}
	block[4] = 9 // a match from before the beginning
	if _, err := unlz4Block(nil, block, 1000); !errors.Is(err, errLZ4) {
		t.Errorf("offset too large: %v", err)
	}
}

func FuzzLZ4(f *testing.F) {
	f.Add([]byte{0x35, 'a', 'b', 'c', 3, 0, 0x30, 'x', 'y', 'z'})
	f.Fuzz(func(t *testing.T, src []byte) {
		if out, err := unlz4Block([]byte("before"), src, 1<<16); err == nil && (len(out) > 1<<16 || string(out[:6]) != "before") {
			t.Fatalf("%d bytes", len(out))
		}
	})
}

func TestUnsign(t *testing.T) {
	body := []byte("module")
	signed := append(bytes.Clone(body), "signature..."...)
	signed = append(signed, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 12)
	signed = append(signed, "~Module signature appended~\n"...)
	if got := unsign(signed); !bytes.Equal(got, body) {
		t.Errorf("%q", got)
	}
	signed[len(signed)-29] = 200 // longer than the file
	if got := unsign(signed); !bytes.Equal(got, signed) {
		t.Errorf("%q", got)
	}
	if got := unsign(body); !bytes.Equal(got, body) {
		t.Errorf("%q", got)
	}
}
