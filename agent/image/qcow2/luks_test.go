package qcow2

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestEncrypt: an image with the LUKS header of another one opens with the other's
// secret, keeps what is written, shows nothing of it without, and names its backing file.
func TestEncrypt(t *testing.T) {
	dir := t.TempDir()
	tool := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil || strings.Contains(string(out), "failed") {
			t.Fatalf("%s %q: %v: %s", name, args, err, out)
		}
		return string(out)
	}
	create := func(args ...string) { // it measures how quick it is, and on a busy host fails to
		t.Helper()
		args = append([]string{"create", "-q", "--object", "secret,id=k,data=open sesame"}, args...)
		for try := 0; ; try++ {
			cmd := exec.CommandContext(t.Context(), "qemu-img", args...)
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err == nil {
				return
			} else if try == 10 {
				t.Fatalf("%v: %s", err, out)
			}
		}
	}
	create("-f", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10", "a", "8M")
	create("-f", "luks", "-o", "key-secret=k,iter-time=10", "b", "8M")
	tool("qemu-img", "create", "-q", "-f", "qcow2", "plain", "8M")
	for i, from := range []string{"a", "b"} {
		luks, err := ReadLUKS(filepath.Join(dir, from))
		if err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("over-%s", from)
		tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "plain", "-F", "qcow2", name, "3G")
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := Encrypt(f, luks); err != nil {
			t.Fatal(err)
		}
		if err := Encrypt(f, luks); !errors.Is(err, ErrFormat) {
			t.Errorf("encrypted twice: %v", err)
		}
		f.Close()
		if h, err := ReadHeader(filepath.Join(dir, name)); err != nil || h.Backing != "plain" || h.SizeBytes != 3<<30 {
			t.Errorf("%+v %v", h, err)
		}
		opened := "driver=qcow2,encrypt.key-secret=k,file.filename=" + name
		secret := "secret,id=k,data=open sesame"
		tool("qemu-io", "--object", secret, "--image-opts", "-c", fmt.Sprintf("write -P %d 1M 1M", 0x50+i), "-c", fmt.Sprintf("read -P %d 1M 1M", 0x50+i), "-c", "read -P 0 0 1M", opened)
		tool("qemu-img", "check", "-q", "--object", secret, "--image-opts", opened)
		if out, err := exec.Command("qemu-io", "-c", "read 0 1M", filepath.Join(dir, name)).CombinedOutput(); err == nil {
			t.Errorf("read without the secret: %s", out)
		}
		raw, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || strings.Contains(string(raw), strings.Repeat(string(rune(0x50+i)), 64)) {
			t.Errorf("what was written is there in the clear (%v)", err)
		}
		again, err := ReadLUKS(filepath.Join(dir, name))
		if err != nil || string(again) != string(luks) {
			t.Errorf("%d bytes of a LUKS header of %d, %v", len(again), len(luks), err)
		}
	}
	if _, err := ReadLUKS(filepath.Join(dir, "plain")); !errors.Is(err, ErrNoLUKS) {
		t.Errorf("plain: %v", err)
	}
}
