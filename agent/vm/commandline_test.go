package vm

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ckagent/ckagent/agent/cmdline"
	"github.com/ckagent/ckagent/agent/problem"
)

func TestReadCommandLine(t *testing.T) {
	c, err := ReadCommandLine(strings.Fields("qemu-system-x86_64 -name guest=web,debug-threads=on -S -machine q35,accel=kvm:tcg,memory-backend=ram0" +
		" -object memory-backend-memfd,id=ram0,size=1G -object secret,id=s0,data=hush -cpu host,+x2apic -uuid 1-2 -rtc base=utc,clock=vm" +
		" -drive file=/i/a.qcow2,if=virtio -drive file=/i/cd.iso,media=cdrom -drive if=pflash,file=/i/vars.fd -blockdev driver=qcow2,read-only=on,node-name=n" +
		" -blockdev {\"driver\":\"file\",\"filename\":\"/i/b\",\"node-name\":\"m\"} -pidfile /run/qemu-server/1.pid -incoming defer"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Name != "web" || c.Accel != "kvm" || c.CPU != "host,+x2apic" || c.UUID != "1-2" || c.RTC != "base=utc,clock=vm" || c.Manager != "proxmox" {
		t.Errorf("%+v", c)
	}
	if diff := cmp.Diff([]string{"ram0"}, c.RAM); diff != "" {
		t.Error(diff)
	}
	if len(c.Disks) != 2 || !strings.Contains(c.Disks[0], "a.qcow2") || !strings.Contains(c.Disks[1], "/i/b") {
		t.Errorf("disks: %q", c.Disks)
	}
	if len(c.Secrets) != 1 || slices.Contains(c.Argv, "-S") || slices.Contains(c.Argv, "-incoming") || strings.Contains(strings.Join(c.Argv, " "), "hush") {
		t.Errorf("%q, secrets %+v", c.Argv, c.Secrets)
	}
	for args, accel := range map[string]string{"-m 1": "tcg", "-enable-kvm": "kvm", "-accel tcg,thread=multi -accel kvm": "tcg", "-M accel=kvm": "kvm"} {
		if c, err := ReadCommandLine(strings.Fields("qemu " + args)); err != nil || c.Accel != accel {
			t.Errorf("%s: %q, %v", args, c.Accel, err)
		}
	}
	for _, argv := range [][]string{nil, {"qemu"}, {"qemu", "-m"}} {
		if _, err := ReadCommandLine(argv); !problem.Is(err, problem.Usage) {
			t.Errorf("%q: %v", argv, err)
		}
	}
}

func TestAccelerators(t *testing.T) {
	for args, want := range map[string]string{
		"":                                   "",
		"-accel kvm -machine q35":            "",
		"-machine q35,accel=tcg":             "tcg",
		"-machine pc,accel=kvm:tcg":          "tcg",
		"-accel kvm -accel tcg,thread=multi": "tcg",
		"-M pc,accel=xen:tcg":                "xen tcg",
		"-accel qtest -accel tcg":            "qtest tcg",
	} {
		opts, err := cmdline.Parse(strings.Fields(args))
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(accelerators(opts), " "); got != want {
			t.Errorf("%q: %q, want %q", args, got, want)
		}
	}
}
