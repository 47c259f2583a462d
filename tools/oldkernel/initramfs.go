package oldkernel

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/guest"
)

//go:embed init.sh
var initScript []byte

// Paths inside.
const (
	ckagentPath = "/bin/ckagent"
	qemuPath    = "/usr/bin/qemu-system-x86_64"
	guestPath   = "/guest.elf"
)

// firmware is what a pc machine without default devices loads to boot a
// multiboot kernel. QEMU finds it by these paths.
var firmware = []string{
	"/usr/share/seabios/bios-256k.bin",
	"/usr/share/qemu/kvmvapic.bin",
	"/usr/share/qemu/multiboot_dma.bin",
	"/usr/share/qemu/linuxboot_dma.bin",
}

// tcgModule is the emulator proper, which Debian packages as a module of QEMU.
const tcgModule = "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so"

var applets = []string{"sh", "cat", "cut", "dd", "dmesg", "echo", "free", "grep", "head", "ip", "kill", "ln", "ls", "mkdir", "mount",
	"poweroff", "ps", "readlink", "rm", "sed", "seq", "setsid", "sleep", "sort", "stty", "tail", "test", "timeout", "touch",
	"true", "uname", "usleep", "wc"}

// initramfs builds the archive: ckagent is the path of the binary under test.
func initramfs(ctx context.Context, ckagent, busybox string) ([]byte, error) {
	mini, err := guest.Mini(ctx)
	if err != nil {
		return nil, err
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		return nil, err
	}
	a := &archive{dirs: map[string]bool{}, have: map[string]bool{}}
	a.add(guest.InitramfsFile{Name: "dev/console", Mode: unix.S_IFCHR | 0o600, Major: 5, Minor: 1})
	a.add(guest.InitramfsFile{Name: "init", Mode: 0o755, Data: initScript})
	for _, dir := range []string{"proc", "sys", "run", "tmp", "root", "var/lib"} {
		a.dir(dir)
	}
	for _, f := range []struct{ to, from string }{
		{"/bin/busybox", busybox}, {ckagentPath, ckagent}, {qemuPath, qemu}, {guestPath, mini},
	} {
		if err := a.copy(f.to, f.from); err != nil {
			return nil, err
		}
	}
	for _, name := range applets {
		a.add(guest.InitramfsFile{Name: "bin/" + name, Mode: unix.S_IFLNK | 0o777, Data: []byte("busybox")})
	}
	for _, path := range firmware {
		if err := a.copy(path, path); err != nil {
			return nil, err
		}
	}
	programs := []string{ckagent, qemu}
	if _, err := os.Stat(tcgModule); err == nil { // a QEMU without modules has it built in
		programs = append(programs, tcgModule)
		if err := a.copy(tcgModule, tcgModule); err != nil {
			return nil, err
		}
	}
	libraries, err := sharedLibraries(ctx, programs...)
	if err != nil {
		return nil, err
	}
	for _, path := range libraries {
		if err := a.copy(path, path); err != nil {
			return nil, err
		}
	}
	return guest.Initramfs(a.files), nil
}

// archive collects files, each with the directories it needs.
type archive struct {
	files      []guest.InitramfsFile
	dirs, have map[string]bool
}

func (a *archive) dir(name string) {
	if name == "." || a.dirs[name] {
		return
	}
	a.dir(filepath.Dir(name))
	a.dirs[name] = true
	a.files = append(a.files, guest.InitramfsFile{Name: name, Mode: unix.S_IFDIR | 0o755})
}

func (a *archive) add(f guest.InitramfsFile) {
	if a.have[f.Name] {
		return
	}
	a.have[f.Name] = true
	a.dir(filepath.Dir(f.Name))
	a.files = append(a.files, f)
}

// copy adds the file from (symbolic links followed) as the absolute path to.
func (a *archive) copy(to, from string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	a.add(guest.InitramfsFile{Name: strings.TrimPrefix(to, "/"), Mode: 0o755, Data: data})
	return nil
}

// lddLine is "name => path (address)", or "path (address)" for the loader itself.
var lddLine = regexp.MustCompile(`^\s*(?:\S+ => )?(/\S+) \(0x[0-9a-f]+\)$`)

// sharedLibraries are the files the dynamic loader would map for the programs.
func sharedLibraries(ctx context.Context, programs ...string) ([]string, error) {
	seen := map[string]bool{}
	for _, p := range programs {
		out, err := exec.CommandContext(ctx, "ldd", p).CombinedOutput()
		if err != nil {
			if bytes.Contains(out, []byte("not a dynamic executable")) {
				continue
			}
			return nil, fmt.Errorf("ldd %s: %w: %s", p, err, out)
		}
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, "not found") {
				return nil, fmt.Errorf("ldd %s: %s", p, strings.TrimSpace(line))
			}
			if m := lddLine.FindStringSubmatch(strings.TrimRight(line, "\n")); m != nil {
				seen[m[1]] = true
			}
		}
	}
	paths := make([]string, 0, len(seen))
	for p := range seen {
		paths = append(paths, p)
	}
	sort.Strings(paths)
	return paths, nil
}
