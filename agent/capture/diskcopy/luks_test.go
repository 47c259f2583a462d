package diskcopy

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/tools/guest"
)

// encrypted makes an image that the secret x opens.
func encrypted(t *testing.T, format, path, size string) string {
	t.Helper()
	options := map[string]string{"qcow2": "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", "luks": "key-secret=s,iter-time=10"}[format]
	for tries := 0; ; tries++ { // it measures how quick it is, and on a busy host fails to
		out, err := exec.Command("qemu-img", "create", "-q", "-f", format, "--object", "secret,id=s,data=x", "-o", options, path, size).CombinedOutput()
		if err == nil {
			return path
		}
		if tries == 10 {
			t.Fatalf("%v: %s", err, out)
		}
	}
}

// TestEncrypted: images that QEMU decrypts are copied as they lie, while the guest's
// writes go to an overlay that is encrypted with the same key. Nothing of what the guest
// wrote is to be read anywhere without the secret, and with it all of it is.
func TestEncrypted(t *testing.T) {
	secret := []string{"--object", "secret,id=s,data=x"}
	for build, q := range builds(t) {
		t.Run(build, func(t *testing.T) {
			testEncrypted(t, q, secret)
		})
	}
}

func testEncrypted(t *testing.T, q guest.QEMU, secret []string) {
	b := newBed(t, q, func(dir string) []string {
		return []string{"-object", "secret,id=s,data=x",
			"-drive", "if=none,id=d,format=qcow2,encrypt.key-secret=s,file=" + encrypted(t, "qcow2", dir+"/a", "32M"), "-device", "virtio-blk-pci,drive=d,id=v",
			"-blockdev", "driver=file,node-name=f,filename=" + encrypted(t, "luks", dir+"/b", "32M"), "-blockdev", "driver=luks,node-name=n,file=f,key-secret=s",
			"-device", "virtio-scsi-pci,id=bus", "-device", "scsi-hd,drive=n,id=w"}
	})
	b.vm.Overlays = true
	devices := []string{virtio, "/machine/peripheral/w"}
	before := b.names()
	var clear [][]byte
	put := func(pattern, at int) {
		t.Helper()
		for _, d := range devices {
			b.write(d, "write -P %d %dM 1M", pattern, at)
		}
		clear = append(clear, bytes.Repeat([]byte{byte(pattern)}, 512))
	}
	nowhere := func() {
		t.Helper()
		err := filepath.Walk(b.dir, func(path string, info os.FileInfo, err error) error {
			if err != nil || !info.Mode().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			for _, c := range clear {
				if bytes.Contains(data, c) {
					t.Errorf("%s holds %d in the clear", path, c[0])
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for round := range 3 {
		put(0x31+round, 4*round)
		w := b.begin(func(c *Config) { b.overlays(c); c.SpeedBytes = 64 << 20 })
		if err := w.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		put(0x41+round, 4*round) // not of this checkpoint
		put(0x51+round, 4*round+1)
		if len(b.strays()) != 2 {
			t.Errorf("overlays %q", b.strays())
		}
		nowhere()
		m := b.finish(w)
		b.wantGraph(before)
		b.wantNoOverlay()
		for i, d := range m.Disks {
			if len(d.Volumes) != round+1 || d.Content != []image.DiskContent{image.ContentQCOW2, image.ContentLUKS}[i] {
				t.Errorf("disk %+v", d)
			}
			if round > 0 && d.Volumes[0].Bytes > 16<<20 {
				t.Errorf("round %d wrote %d bytes", round, d.Volumes[0].Bytes)
			}
			volume := filepath.Join(b.store.VolumeDir("vm"), d.Volumes[0].Name)
			opened := "driver=qcow2,encrypt.key-secret=s,file.driver=qcow2,file.file.filename=" + volume
			if i == 1 {
				opened = "driver=luks,key-secret=s,file.driver=qcow2,file.file.filename=" + volume
			}
			for at, want := range map[int]int{4 * round: 0x31 + round, 4*round + 1: 0} {
				if i == 1 && want == 0 {
					continue // what was never written to a container is not zero in it
				}
				out := run(t, "qemu-io", append(slices.Clone(secret), "-r", "--image-opts", "-c", fmt.Sprintf("read -P %d %dM 1M", want, at), opened)...)
				if strings.Contains(out, "failed") {
					t.Errorf("round %d, disk %d at %d MiB: %s", round, i, at, out)
				}
			}
			if i == 0 {
				run(t, "qemu-img", append([]string{"check", "-q"}, append(slices.Clone(secret), "--image-opts", opened)...)...)
			}
		}
		nowhere()
	}
}
