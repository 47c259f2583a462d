package vm

import "testing"

func TestRedactXML(t *testing.T) {
	for in, want := range map[string]string{
		`<graphics type='vnc' port='5900' passwd='hunter2' listen='::1'>`:              `<graphics type='vnc' port='5900' listen='::1'>`,
		`<graphics type="spice" passwd="hunter2"/><name>passwd='x'</name>`:             `<graphics type="spice"/><name>passwd='x'</name>`,
		`<domain type='qemu'><name>data=1</name></domain>`:                             ``,
		`<qemu:arg value='-device'/><qemu:arg value='virtio-net-pci,netdev=n'/>`:       ``,
		`<qemu:arg value='secret,id=s,data=hunter2,format=raw'/>`:                      `<qemu:arg value='secret,id=s,data=[redacted],format=raw'/>`,
		`<qemu:arg value="user=u,password=hunter2"/>`:                                  `<qemu:arg value="user=u,password=[redacted]"/>`,
		`<qemu:env name='API_TOKEN' value='hunter2'/>`:                                 `<qemu:env name='API_TOKEN' value='[redacted]'/>`,
		`<qemu:env name='LANG' value='C'/>`:                                            ``,
		`<source protocol='https' name='https://u:hunter2@host/d'/>`:                   `<source protocol='https' name='https://u:[redacted]@host/d'/>`,
		`<qemu:arg value='-netdev'/><qemu:arg value='tap,id=n'/><qemu:arg value='x'/>`: ``,
	} {
		if want == "" {
			want = in
		}
		if got := redactXML(in); got != want {
			t.Errorf("%s\n got %s\nwant %s", in, got, want)
		}
	}
}
