package guest

import (
	"context"
	"embed"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"

	"github.com/ckagent/ckagent/agent/problem"
)

//go:embed guestd/*.c guestd/*.h mini/* sqld/*.c
var sources embed.FS

// recipe changes when the way an artifact is built changes, so that old ones
// are not taken for new ones.
const recipe = "1"

// Image is a bootable Linux guest: files for QEMU's -kernel and -initrd.
type Image struct {
	Kernel  string // ELF kernel with a PVH entry: the quickest under emulation
	BzImage string // the same kernel for firmware that loads it itself (UEFI)
	Initrd  string
}

// Linux returns the self-checking Linux guest, built if it is not there yet.
// What it does is chosen by GD_ words on its command line (README.md).
func Linux(ctx context.Context) (Image, error) {
	kernel, err := linuxKernel(ctx)
	if err != nil {
		return Image{}, err
	}
	src, names, err := sourceFiles("guestd")
	if err != nil {
		return Image{}, err
	}
	parts := [][]byte{[]byte(recipe), []byte(filepath.Base(kernel))}
	for _, n := range names {
		parts = append(parts, []byte(n), src[n])
	}
	dir, err := artifact(ctx, "linux", stamp(parts...), func(dir string) error {
		return buildInitrd(ctx, dir, kernel, src, names)
	})
	if err != nil {
		return Image{}, err
	}
	return Image{
		Kernel:  filepath.Join(kernel, "vmlinux"),
		BzImage: filepath.Join(kernel, "bzImage"),
		Initrd:  filepath.Join(dir, "initrd"),
	}, nil
}

// linuxKernel is an artifact with vmlinux, bzImage, modules/ and busybox: what
// comes from packages, kept apart from what comes from our sources so that an
// edit needs no network.
func linuxKernel(ctx context.Context) (string, error) {
	r, err := currentRelease()
	if err != nil {
		return "", err
	}
	return artifact(ctx, "kernel", stamp([]byte(recipe), []byte(r.codename)), func(dir string) error {
		a, err := openApt()
		if err != nil {
			return err
		}
		pkg, err := a.dependency(ctx, "linux-image-cloud-amd64", regexp.MustCompile(`^linux-image-[0-9].*-cloud-amd64$`))
		if err != nil {
			return err
		}
		root := filepath.Join(dir, "root")
		if err := a.unpack(ctx, root, pkg, "busybox-static"); err != nil {
			return err
		}
		images, _ := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
		modules, _ := filepath.Glob(filepath.Join(root, "*/modules/*/kernel"))
		more, _ := filepath.Glob(filepath.Join(root, "usr/*/modules/*/kernel"))
		modules = append(modules, more...)
		if len(images) != 1 || len(modules) != 1 {
			return problem.New(problem.Failed, "unpack", pkg, "found %d kernels and %d module trees", len(images), len(modules))
		}
		image, err := os.ReadFile(images[0])
		if err != nil {
			return err
		}
		vmlinux, err := extractVmlinux(image)
		if err != nil {
			return problem.New(problem.Failed, "take the kernel out of", pkg, "%w", err)
		}
		if err := os.WriteFile(filepath.Join(dir, "vmlinux"), vmlinux, 0o644); err != nil {
			return err
		}
		if err := os.Rename(images[0], filepath.Join(dir, "bzImage")); err != nil {
			return err
		}
		if err := os.Rename(modules[0], filepath.Join(dir, "modules")); err != nil {
			return err
		}
		busybox := filepath.Join(root, "bin/busybox")
		if _, err := os.Stat(busybox); err != nil {
			busybox = filepath.Join(root, "usr/bin/busybox")
		}
		if err := os.Rename(busybox, filepath.Join(dir, "busybox")); err != nil {
			return err
		}
		return os.RemoveAll(root)
	})
}

func buildInitrd(ctx context.Context, dir, kernel string, src map[string][]byte, names []string) error {
	guestd, err := compile(ctx, src, names, "guestd",
		"-static", "-O2", "-pthread", "-Wall", "-Wextra", "-Werror", "-s")
	if err != nil {
		return err
	}
	busybox, err := os.ReadFile(filepath.Join(kernel, "busybox"))
	if err != nil {
		return err
	}
	files := []file{
		{name: "dev", mode: modeDir | 0o755},
		// The kernel opens it for init before devtmpfs is there.
		{name: "dev/console", mode: modeChar | 0o600, major: 5, minor: 1},
		{name: "init", mode: 0o755, data: guestd},
		{name: "bin", mode: modeDir | 0o755},
		{name: "bin/busybox", mode: 0o755, data: busybox},
	}
	for _, applet := range applets {
		files = append(files, file{name: "bin/" + applet, mode: modeLink | 0o777, data: []byte("busybox")})
	}
	modules, err := moduleFiles(filepath.Join(kernel, "modules"))
	if err != nil {
		return problem.New(problem.Failed, "collect kernel modules", "", "%w", err)
	}
	return os.WriteFile(filepath.Join(dir, "initrd"), cpio(append(files, modules...)), 0o644)
}

// applets that a script or a person at GD_SH's shell wants.
var applets = []string{"sh", "ash", "cat", "cp", "date", "dd", "df", "dmesg", "echo", "env", "free", "grep", "head",
	"hexdump", "id", "ifconfig", "ip", "kill", "ln", "ls", "lsmod", "md5sum", "mkdir", "mount", "mv", "nc", "ping",
	"poweroff", "ps", "reboot", "rm", "sed", "sha256sum", "sleep", "stty", "sync", "tail", "test", "top", "touch",
	"true", "umount", "uname", "uptime", "vi", "wc", "wget"}

// sourceFiles returns the embedded files of a folder and their names in order.
func sourceFiles(folder string) (map[string][]byte, []string, error) {
	entries, err := sources.ReadDir(folder)
	if err != nil {
		return nil, nil, err
	}
	files := map[string][]byte{}
	var names []string
	for _, e := range entries {
		if files[e.Name()], err = sources.ReadFile(folder + "/" + e.Name()); err != nil {
			return nil, nil, err
		}
		names = append(names, e.Name())
	}
	sort.Strings(names)
	return files, names, nil
}

// compile writes the sources to a temporary directory and runs gcc on the .c and
// .S files with the flags ("-T", "x.ld" and the like find the others there);
// libraries among them come last, as the linker wants them.
func compile(ctx context.Context, src map[string][]byte, names []string, output string, flags ...string) ([]byte, error) {
	tmp, err := os.MkdirTemp("", "ckagent-guest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	libs := func(flag string) bool { return strings.HasPrefix(flag, "-l") }
	args := append([]string{"-o", output}, slices.DeleteFunc(slices.Clone(flags), libs)...)
	for _, n := range names {
		if err := os.WriteFile(filepath.Join(tmp, n), src[n], 0o644); err != nil {
			return nil, err
		}
		if ext := filepath.Ext(n); ext == ".c" || ext == ".S" {
			args = append(args, n)
		}
	}
	for _, flag := range flags {
		if libs(flag) {
			args = append(args, flag)
		}
	}
	if _, err := run(ctx, tmp, "gcc", args...); err != nil {
		return nil, fmt.Errorf("compile %s: %w", output, err)
	}
	return os.ReadFile(filepath.Join(tmp, output))
}

// KernelArgs begin the Linux guest's command line: console on the first serial
// port, silence but for errors, power off instead of a dead machine, and no
// waiting for what a virtual machine does not have.
const KernelArgs = "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on no_timer_check cryptomgr.notests raid=noautodetect"
