package guest

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/ckagent/ckagent/agent/problem"
)

// QEMU is a QEMU that is not the machine's own.
type QEMU struct {
	Binary string   // the program
	Env    []string // NAME=value for its environment: where its libraries and modules are
	Args   []string // arguments to put first: where its firmware is
}

// QEMU10 returns QEMU 10.0 for x86, unpacked from the backports of this Debian
// release together with those libraries that the machine lacks.
func QEMU10(ctx context.Context) (QEMU, error) {
	r, err := currentRelease()
	if err != nil {
		return QEMU{}, err
	}
	backports := r.codename + "-backports"
	dir, err := artifact(ctx, "qemu10", stamp([]byte(recipe), []byte(backports)), func(dir string) error {
		a, err := openApt(backports)
		if err != nil {
			return err
		}
		packages, err := a.missing(ctx, backports, "qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios", "ipxe-qemu")
		if err != nil {
			return err
		}
		if err := a.unpack(ctx, dir, packages...); err != nil {
			return err
		}
		// A first start proves that every library is there.
		out, err := runEnv(ctx, qemuAt(dir).Env, qemuAt(dir).Binary, "--version")
		if err != nil {
			return err
		}
		if !strings.Contains(string(out), "version 10.") {
			return problem.New(problem.Failed, "unpack QEMU 10", backports, "its version is %q", firstLine(string(out)))
		}
		return nil
	})
	if err != nil {
		return QEMU{}, err
	}
	return qemuAt(dir), nil
}

func firstLine(s string) string { line, _, _ := strings.Cut(s, "\n"); return line }

func qemuAt(dir string) QEMU {
	lib := filepath.Join(dir, "usr/lib/x86_64-linux-gnu")
	return QEMU{
		Binary: filepath.Join(dir, "usr/bin/qemu-system-x86_64"),
		Env: []string{
			"LD_LIBRARY_PATH=" + strings.Join([]string{lib, filepath.Join(dir, "lib/x86_64-linux-gnu"),
				filepath.Join(lib, "pulseaudio")}, ":"),
			"QEMU_MODULE_DIR=" + filepath.Join(lib, "qemu"),
		},
		Args: []string{"-L", filepath.Join(dir, "usr/share/seabios"), "-L", filepath.Join(dir, "usr/lib/ipxe/qemu"),
			"-L", filepath.Join(dir, "usr/share/qemu")},
	}
}

var installLine = regexp.MustCompile(`^Inst (\S+) (?:\[[^\]]*\] )?\((\S+) .*\)`)

// missing asks apt what installing the packages from the suite would bring to
// this machine, as name=version; the packages themselves are always among them.
// Nothing is installed: apt only simulates.
func (a *apt) missing(ctx context.Context, suite string, packages ...string) ([]string, error) {
	if err := a.refresh(ctx, false); err != nil {
		return nil, err
	}
	args := append([]string{"-s", "--no-install-recommends", "-t", suite, "--reinstall", "install"}, packages...)
	out, err := a.run(ctx, "", "apt-get", args...)
	if err != nil {
		return nil, problem.New(problem.Failed, "resolve packages of", suite, "%w", err)
	}
	var list []string
	for line := range strings.Lines(string(out)) {
		if m := installLine.FindStringSubmatch(strings.TrimSpace(line)); m != nil {
			list = append(list, m[1]+"="+m[2])
		}
	}
	if len(list) == 0 {
		return nil, problem.New(problem.NotFound, "resolve packages of", suite, "apt names none")
	}
	return list, nil
}

// Firmware is a UEFI firmware for two pflash drives: code is only read, vars is
// a template of which each machine needs a writable copy.
type Firmware struct{ Code, Vars string }

// OVMF returns the UEFI firmware for x86-64 without secure boot (4 MiB edition).
func OVMF(ctx context.Context) (Firmware, error) {
	r, err := currentRelease()
	if err != nil {
		return Firmware{}, err
	}
	dir, err := artifact(ctx, "ovmf", stamp([]byte(recipe), []byte(r.codename)), func(dir string) error {
		a, err := openApt()
		if err != nil {
			return err
		}
		return a.unpack(ctx, dir, "ovmf")
	})
	if err != nil {
		return Firmware{}, err
	}
	fw := Firmware{Code: filepath.Join(dir, "usr/share/OVMF/OVMF_CODE_4M.fd"), Vars: filepath.Join(dir, "usr/share/OVMF/OVMF_VARS_4M.fd")}
	for _, f := range []string{fw.Code, fw.Vars} {
		if _, err := os.Stat(f); err != nil {
			return Firmware{}, problem.New(problem.Failed, "find UEFI firmware", "ovmf", "%w", err)
		}
	}
	return fw, nil
}
