package plan

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/restore/netid"
)

const (
	runDir = "/run/ckagent/restored/vm-1"
	ownDir = runDir + "/" + VMDir
)

// tail is what every plan ends with.
var tail = []string{
	"-chardev", "socket,id=ckagent-qmp,fd=" + QMPFD + ",server=on,wait=off",
	"-mon", "chardev=ckagent-qmp,mode=control", "-incoming", "defer", "-S",
}

func recorded(args ...string) Recorded {
	return Recorded{VM: "vm", ID: "c1", Binary: "/usr/bin/qemu-system-x86_64", Argv: args,
		Cwd: "/home/vm", Machine: "pc-q35-7.2", Accel: "tcg"}
}

func maps(t *testing.T, specs ...string) (out []Mapping) {
	t.Helper()
	for _, s := range specs {
		m, err := ParseMapping(s)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, m)
	}
	return out
}

// build plans, and returns the arguments without the tail.
func build(t *testing.T, rec Recorded, o Options) (*Plan, []string) {
	t.Helper()
	if o.RunDir == "" {
		o.RunDir = runDir
	}
	p, err := Build(rec, o)
	if err != nil {
		t.Fatalf("%v: %v", rec.Argv, err)
	}
	n := len(p.Args) - len(tail)
	if n < 0 || !slices.Equal(p.Args[n:], tail) {
		t.Fatalf("plan ends with %q", p.Args)
	}
	return p, p.Args[:n]
}

func words(s string) []string { return strings.Fields(s) }

func TestBuild(t *testing.T) {
	const m = "-machine pc-q35-7.2 "
	for _, c := range []struct {
		name, in, want string
	}{
		{"alias and fallback are pinned", "-machine q35,accel=kvm:tcg -m 1G", "-machine pc-q35-7.2,accel=tcg -m 1G"},
		{"the default machine is named", "-m 1G", m + "-m 1G"},
		{"one accelerator is left", m + "-accel kvm -accel tcg,thread=single", m + "-accel tcg,thread=single"},
		{"-M counts", "-M q35", "-M pc-q35-7.2"},
		{"pinned stays", "-machine type=pc-q35-7.2,smm=off", "-machine type=pc-q35-7.2,smm=off"},
		{"start-up options", m + "-daemonize -S -incoming tcp:0:4444 -loadvm a -preconfig", m},
		{"an earlier restore's additions", m + "-chardev socket,id=ckagent-qmp,fd=3,server=on,wait=off -mon chardev=ckagent-qmp,mode=control -incoming defer -S", m},

		{"prealloc", m + "-mem-prealloc -m 1G", m + "-m 1G"},
		{"mem-path", m + "-mem-path /dev/shm/x -m 1G", m + "-m 1G"},
		{"mem-lock", m + "-overcommit mem-lock=on,cpu-pm=on", m + "-overcommit mem-lock=off,cpu-pm=on"},
		{"ram backend", m + "-object memory-backend-ram,id=r,size=1G,prealloc=on,prealloc-threads=2", m + "-object memory-backend-ram,id=r,size=1G"},
		{"memfd stays", m + "-object memory-backend-memfd,id=r,size=1G,share=on", m + "-object memory-backend-memfd,id=r,size=1G,share=on"},
		{"private file", m + "-object memory-backend-file,id=r,mem-path=/dev/shm/a,size=1G,align=2M,discard-data=on", m + "-object memory-backend-ram,id=r,size=1G"},
		{"shared file", m + "-object memory-backend-file,id=r,mem-path=/a,size=1G,share=on,prealloc=on", m + "-object memory-backend-memfd,id=r,size=1G,share=on"},
		{"JSON file", m + `-object {"qom-type":"memory-backend-file","id":"r","mem-path":"/a","size":1073741824,"share":true,"prealloc":true}`,
			m + `-object {"qom-type":"memory-backend-memfd","id":"r","size":1073741824,"share":true}`},

		{"server does not wait", m + "-chardev socket,id=c,path=/run/c.sock,server=on", m + "-chardev socket,id=c,path=/run/c.sock,server=on,wait=off"},
		{"old server does not wait", m + "-serial unix:/run/c.sock,server", m + "-serial unix:/run/c.sock,server,wait=off"},
		{"comma in an old socket's path", m + "-serial mon:unix:/run/a,,b,server", m + "-serial mon:unix:path=/run/a,,b,server,wait=off"},
		{"nowait is understood", m + "-qmp unix:/run/c.sock,server,nowait", m + "-qmp unix:/run/c.sock,server,nowait"},
		{"inherited socket", m + "-chardev socket,id=mon0,fd=24,server=on,wait=off", m + "-chardev socket,id=mon0,server=on,wait=off,path=" + ownDir + "/mon0.sock"},
		{"inherited connection", m + "-chardev socket,id=c,fd=24", m + "-chardev null,id=c"},
		{"log is appended to", m + "-chardev file,id=c,path=/l", m + "-chardev file,id=c,path=/l,append=on"},
		{"old log is appended to", m + "-serial file:/l", m + "-serial chardev:ckagent-serial0 -chardev file,id=ckagent-serial0,path=/l,append=on"},
		{"mux keeps", m + "-serial mon:stdio", m + "-serial mon:stdio"},
		{"client stays", m + "-chardev socket,id=c,host=h,port=1,reconnect=2", m + "-chardev socket,id=c,host=h,port=1,reconnect=2"},
		{"terminal display", m + "-display curses", m + "-display none"},
		{"an earlier restore's sockets", m + "-chardev socket,id=c,path=/run/ckagent/restored/vm-0.3/vm/c.sock,server=on,wait=off -vnc unix:/run/ckagent/restored/vm-0/vm/vnc.sock -serial unix:/run/ckagent/restored/vm-0/vm/serial.sock,server,nowait",
			m + "-chardev socket,id=c,path=" + ownDir + "/c.sock,server=on,wait=off -vnc unix:" + ownDir + "/vnc.sock -serial unix:" + ownDir + "/serial.sock,server,nowait"},
		{"what -set says", m + "-drive id=d,if=none,file=/a.iso,readonly=on -set drive.d.file=/b,1.iso -set device.x.y=z",
			m + "-drive id=d,if=none,file=/b,,1.iso,readonly=on -set device.x.y=z"},
		{"window without a desktop", m + "-display gtk,gl=on", m + "-display none"},
		{"generation id", m + "-device vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87", m + "-device vmgenid,guid=auto"},
		{"guest text is left alone", m + "-append console=/dev/shm -name a,process=b", m + "-append console=/dev/shm -name a,process=b"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, got := build(t, recorded(words(c.in)...), Options{})
			if !slices.Equal(got, words(c.want)) {
				t.Errorf("got  %q\nwant %q", got, words(c.want))
			}
		})
	}
}

func TestMap(t *testing.T) {
	const m = "-machine pc-q35-7.2 "
	for _, c := range []struct {
		name, in string
		maps     []string
		want     string
	}{
		{"directory", "-kernel /srv/vm/k -drive file=/srv/vm/d.raw,readonly=on", []string{"/srv/vm=/mnt/x"}, "-kernel /mnt/x/k -drive file=/mnt/x/d.raw,readonly=on"},
		{"not a substring", "-kernel /srv/vm2/k -initrd /srv/vm", []string{"/srv/vm=/mnt"}, "-kernel /srv/vm2/k -initrd /mnt"},
		{"not in the middle", "-kernel /x/srv/vm/k -initrd /srv/vm/i", []string{"/srv/vm=/mnt"}, "-kernel /x/srv/vm/k -initrd /mnt/i"},
		{"component anywhere", "-kernel /srv/vm1/k -initrd /srv/vm12/k", []string{"vm1=vm2"}, "-kernel /srv/vm2/k -initrd /srv/vm12/k"},
		{"first match wins", "-kernel /a/k -initrd /b/i", []string{"/a=/b", "/b=/a"}, "-kernel /b/k -initrd /a/i"},
		{"sockets", "-qmp unix:/run/a.sock,server,nowait -chardev socket,id=c,path=/run/b.sock,server=on,wait=off", []string{"/run=/tmp/r"},
			"-qmp unix:/tmp/r/a.sock,server,nowait -chardev socket,id=c,path=/tmp/r/b.sock,server=on,wait=off"},
		{"comma", "-drive file=/vm/a,,b.raw,readonly=on -initrd /vm/a,b.raw", []string{"/vm/a,b.raw=/vm/c,d"}, "-drive file=/vm/c,,d,readonly=on -initrd /vm/c,d"},
		{"JSON", `-blockdev {"driver":"file","filename":"/a/d","node-name":"n","read-only":true}`, []string{"/a=/b"}, `-blockdev {"driver":"file","filename":"/b/d","node-name":"n","read-only":true}`},
		{"nested JSON", `-blockdev {"driver":"raw","file":{"driver":"file","filename":"/a/d"},"node-name":"n","read-only":true}`, []string{"/a=/b"},
			`-blockdev {"driver":"raw","file":{"driver":"file","filename":"/b/d"},"node-name":"n","read-only":true}`},
		{"port of a socket", "-chardev socket,id=c,host=127.0.0.1,port=7000,server=on,wait=off", []string{"7000=7001"}, "-chardev socket,id=c,host=127.0.0.1,port=7001,server=on,wait=off"},
		{"host and port", "-chardev socket,id=c,host=127.0.0.1,port=7000,server=on,wait=off", []string{"127.0.0.1:7000=127.0.0.2:7001"}, "-chardev socket,id=c,host=127.0.0.2,port=7001,server=on,wait=off"},
		{"old port", "-monitor tcp:127.0.0.1:7000,server,nowait", []string{"7000=7001"}, "-monitor tcp:127.0.0.1:7001,server,nowait"},
		{"forwarded port", "-netdev user,id=n,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=tcp::22-:2222", []string{"2222=2223"}, "-netdev user,id=n,hostfwd=tcp:127.0.0.1:2223-:22,hostfwd=tcp::22-:2222"},
		{"VNC display", "-vnc :1,share=ignore", []string{"5901=5902"}, "-vnc :2,share=ignore"},
		{"netdev", "-netdev tap,id=n,fd=33,vhost=on -device virtio-net-pci,netdev=n", []string{"netdev:n=tap,ifname=t0,script=no"}, "-netdev tap,ifname=t0,script=no,id=n -device virtio-net-pci,netdev=n"},
		{"no netdev", "-netdev tap,id=n,fd=33", []string{"netdev:n=none"}, "-netdev hubport,id=n,hubid=6515456"},
		{"no netdev for a card with offloads", "-netdev tap,id=n,queues=2,fds=3:4 -device virtio-net-pci,netdev=n,mq=on", []string{"netdev:n=none"},
			"-netdev tap,id=n,script=no,downscript=no,queues=2 -device virtio-net-pci,netdev=n,mq=on"},
		{"no netdev instead of a user network", "-netdev user,id=n,hostfwd=tcp::22-:2222", []string{"netdev:n=none"}, "-netdev user,id=n,restrict=on"},
		{"tap", "-netdev tap,id=n,ifname=tap0,script=no -device e1000,netdev=n", []string{"tap0=tap7"}, "-netdev tap,id=n,ifname=tap7,script=no -device e1000,netdev=n"},
		{"bridge", "-netdev bridge,id=n,br=lan -device e1000,netdev=n", []string{"lan=dmz"}, "-netdev bridge,id=n,br=dmz -device e1000,netdev=n"},
		{"descriptor set", "-add-fd fd=3,set=2 -drive file=/dev/fdset/2,readonly=on", []string{"/dev/fdset/2=/d"}, "-drive file=/d,readonly=on"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, got := build(t, recorded(words(m+c.in)...), Options{Map: maps(t, c.maps...)})
			if !slices.Equal(got, words(m+c.want)) {
				t.Errorf("got  %q\nwant %q", got, words(m+c.want))
			}
		})
	}
}

func TestClone(t *testing.T) {
	rec := recorded(words("-machine pc-q35-7.2 -name web,debug-threads=on -uuid 6f2a0e9c-7a3f-4be6-9d6e-0d5a3c1f1b11 " +
		"-netdev tap,id=n0,ifname=t0,vhost=on -device virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01,id=c0 " +
		"-netdev user,id=n1,hostfwd=tcp::2222-:22 -device e1000,netdev=n1 " +
		"-qmp unix:/run/web.sock,server,nowait -serial file:/var/log/web.log -pidfile /run/web.pid -vnc :3 " +
		"-drive if=pflash,format=raw,file=/fw/code.fd,readonly=on -drive if=pflash,format=raw,file=/vm/vars.fd")...)
	p, got := build(t, rec, Options{CloneID: "k7"})
	args := strings.Join(got, " ")
	for _, want := range []string{
		"-name web-clone-k7,debug-threads=on ", "-netdev tap,id=n0,script=no,downscript=no ", "-netdev user,id=n1,restrict=on ",
		"-qmp unix:" + ownDir + "/qmp.sock,server=on,wait=off ", "path=" + ownDir + "/serial.log,append=on", "-vnc unix:" + ownDir + "/vnc.sock ",
		"file=/fw/code.fd,readonly=on ", "file=" + ownDir + "/pflash-vars.fd",
	} {
		if !strings.Contains(args+" ", want) {
			t.Errorf("no %q in %s", want, args)
		}
	}
	for _, bad := range []string{"52:54:00:00:00:01", "6f2a0e9c", "web.pid", "ifname", "2222", "/var/log/web.log"} {
		if strings.Contains(args, bad) {
			t.Errorf("%q is still in %s", bad, args)
		}
	}
	if p.OldName != "web" || p.Name != "web-clone-k7" || p.UUID == p.OldUUID {
		t.Errorf("identity: %q %q %q %q", p.OldName, p.Name, p.OldUUID, p.UUID)
	}
	if want := []Copy{{"/vm/vars.fd", ownDir + "/pflash-vars.fd"}}; !slices.Equal(p.Copies, want) {
		t.Errorf("copies %v", p.Copies)
	}
	if len(p.Listen) != 0 {
		t.Errorf("a clone listens on %v", p.Listen)
	}
	// Deterministic: the same id makes the same clone, another one another.
	if q, _ := build(t, rec, Options{CloneID: "k7"}); !slices.Equal(p.Args, q.Args) {
		t.Error("the same clone differs")
	}
	if q, _ := build(t, rec, Options{CloneID: "k8"}); cloneMAC("k7", "c0/n0") == cloneMAC("k8", "c0/n0") || q.UUID == p.UUID {
		t.Error("two clones share an address")
	}
	if mac := cloneMAC("k7", "x"); !strings.ContainsRune("26ae", rune(mac[1])) {
		t.Errorf("%s is not a locally administered unicast address", mac)
	}
}

func TestRefuse(t *testing.T) {
	disk := "-blockdev driver=file,node-name=f,filename=/d,auto-read-only=on -blockdev driver=raw,node-name=r,file=f"
	for _, c := range []struct {
		name, in string
		o        Options
		code     problem.Code
		hint     string
	}{
		{"nvdimm", "-object memory-backend-file,id=r,mem-path=/a,size=1G,share=on -device nvdimm,memdev=r", Options{}, problem.Refused, "power-off"},
		{"unknown backend", "-object memory-backend-epc,id=r,size=1G", Options{}, problem.Refused, "memory-backend-ram"},
		{"network descriptor", "-netdev tap,id=n,fd=33", Options{}, problem.Refused, "--map netdev:n="},
		{"file descriptor", "-drive file=/dev/fdset/7,readonly=on", Options{}, problem.Refused, "--map /dev/fdset/7="},
		{"clone's disk", disk, Options{CloneID: "k"}, problem.Refused, "--map /d="},
		{"clone's queues", "-netdev tap,id=n,queues=4", Options{CloneID: "k"}, problem.Refused, "--map netdev:n="},
		{"secret", "-object secret,id=s,data=" + image.RedactedMark, Options{}, problem.Refused, "--secret s="},
		{"password", "-spice port=5900,password=" + image.RedactedMark, Options{}, problem.Refused, "secret object"},
		{"unused map", "-m 1G", Options{Map: maps(t, "/nowhere=/x")}, problem.Usage, "dry-run"},
		{"unknown secret", "-m 1G", Options{Secrets: map[string]string{"x": "/f"}}, problem.Usage, ""},
		{"own -incoming", "-m 1G", Options{Extra: words("-incoming tcp:0:1")}, problem.Usage, ""},
		{"value missing", "-m", Options{}, problem.Refused, ""},
		{"configuration", "-readconfig /etc/vm.cfg", Options{}, problem.Refused, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.o.RunDir = runDir
			_, err := Build(recorded(words(c.in)...), c.o)
			var p *problem.Error
			if !errors.As(err, &p) || p.Code != c.code || !strings.Contains(p.Hint, c.hint) {
				t.Fatalf("%v, want %s with hint %q", err, c.code, c.hint)
			}
		})
	}
}

func TestSecretFromFile(t *testing.T) {
	_, got := build(t, recorded(words("-machine pc-q35-7.2 -object secret,id=s,data="+image.RedactedMark+",format=base64")...),
		Options{Secrets: map[string]string{"s": "/root/s"}})
	if want := words("-machine pc-q35-7.2 -object secret,id=s,file=/root/s"); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestReadConfigIsInlined(t *testing.T) {
	o := Options{ReadFile: func(name string) ([]byte, error) {
		if name != "/etc/vm.cfg" {
			return nil, os.ErrNotExist
		}
		return []byte("[object \"r\"]\n qom-type = \"memory-backend-ram\"\n size = \"1G\"\n prealloc = \"on\"\n"), nil
	}}
	_, got := build(t, recorded(words("-machine pc-q35-7.2 -readconfig /etc/vm.cfg")...), o)
	if args := strings.Join(got, " "); strings.Contains(args, "prealloc") || !strings.Contains(args, "memory-backend-ram") {
		t.Errorf("got %s", args)
	}
}

func TestListenAndFiles(t *testing.T) {
	p, _ := build(t, recorded(words("-machine pc-q35-7.2 -qmp unix:q.sock,server,nowait -chardev socket,id=c,host=::1,port=70,server=on,wait=off "+
		"-vnc 127.0.0.1:2 -netdev user,id=n,hostfwd=tcp:127.0.0.1:2222-:22 -kernel k -cdrom /iso -pflash v.fd "+
		`-blockdev {"driver":"file","node-name":"f","filename":"/d","auto-read-only":true} -blockdev {"driver":"raw","node-name":"r","file":"f","read-only":true}`)...), Options{})
	wantListen := []Socket{{"tcp", "::1:70", "-chardev c"}, {"unix", "/home/vm/q.sock", "-qmp"}, {"tcp", "127.0.0.1:5902", "-vnc"}, {"tcp", "127.0.0.1:2222", "-netdev n"}}
	if !slices.Equal(p.Listen, wantListen) {
		t.Errorf("listen %v", p.Listen)
	}
	wantFiles := []File{{Path: "/iso", Option: "-cdrom"}, {Path: "/home/vm/v.fd", Option: "-pflash", Writable: true, Firmware: true},
		{Path: "/d", Option: "-blockdev"}, {Path: "/home/vm/k", Option: "-kernel"}}
	if !slices.Equal(p.Files, wantFiles) {
		t.Errorf("files %+v", p.Files)
	}
	if want := []string{"/home/vm/q.sock"}; !slices.Equal(p.OldUnix, want) {
		t.Errorf("old sockets %v", p.OldUnix)
	}
}

// A manifest is data: what would make QEMU load code, or run something, is not
// taken from it.
func TestEnvironment(t *testing.T) {
	rec := recorded("-m", "1G")
	rec.Env = []string{"TZ=UTC", "LC_ALL=C", "LD_PRELOAD=/tmp/x.so", "LD_LIBRARY_PATH=/tmp", "QEMU_MODULE_DIR=/tmp", "PATH=/tmp", "GCONV_PATH=/tmp", "broken"}
	p, _ := build(t, rec, Options{})
	if want := []string{"TZ=UTC", "LC_ALL=C"}; !slices.Equal(p.Env, want) {
		t.Errorf("environment %q, want %q", p.Env, want)
	}
	if len(p.Changes) == 0 || !strings.Contains(p.Changes[0].What, "LD_PRELOAD") {
		t.Errorf("nothing is said of it: %v", p.Changes)
	}
}

func TestParseMapping(t *testing.T) {
	for _, bad := range []string{"", "a", "=b", "a=", "/=/x", "80=/x", "netdev:=x", "/a\x00b=/c"} {
		if m, err := ParseMapping(bad); problem.CodeOf(err) != problem.Usage {
			t.Errorf("%q: %+v, %v", bad, m, err)
		}
	}
	for in, want := range map[string]mapKind{"/a=/b": mapPath, "a=b": mapPath, "80=81": mapPort, "[::1]:80=[::1]:81": mapPort, "netdev:x=none": mapNetdev} {
		if m, err := ParseMapping(in); err != nil || m.kind != want {
			t.Errorf("%q: %+v, %v", in, m, err)
		}
	}
}

// FuzzBuild looks for command lines that crash the planner, or make a plan that
// would start the VM running, loading, or in the background.
func FuzzBuild(f *testing.F) {
	f.Add("-machine q35,accel=kvm:tcg\n-m\n1G\n-mem-path\n/dev/shm\n-S\n-incoming\ndefer", "", "/a=/b")
	f.Add("-object\n{\"qom-type\":\"memory-backend-file\",\"id\":\"r\",\"share\":true}\n-netdev\ntap,id=n,fd=3", "k", "netdev:n=none")
	f.Add("-serial\nfile:x\n-qmp\nunix:/a,server\n-vnc\n:1,to=3\n-spice\nport=1\n-blockdev\ndriver=file,filename=/d", "k", "5901=5902")
	f.Fuzz(func(t *testing.T, argv, clone, mapping string) {
		o := Options{RunDir: runDir, CloneID: clone}
		if m, err := ParseMapping(mapping); err == nil {
			o.Map = []Mapping{m}
		}
		p, err := Build(recorded(strings.Split(argv, "\n")...), o)
		if err != nil {
			var pe *problem.Error
			if !errors.As(err, &pe) {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		if n := len(p.Args) - len(tail); n < 0 || !slices.Equal(p.Args[n:], tail) {
			t.Fatalf("plan ends with %q", p.Args)
		}
		// What a restore leaves behind is what the next one starts from.
		rec := recorded(p.Args...)
		rec.Cwd = p.Cwd
		if _, err := Build(rec, Options{RunDir: runDir}); err != nil && clone == "" && len(o.Map) == 0 {
			t.Fatalf("the plan cannot be planned again: %v", err)
		}
	})
}

// TestNICs: a plan tells which addresses are on networks with others.
func TestNICs(t *testing.T) {
	rec := recorded(words("-machine pc-q35-7.2 -netdev tap,id=n0,ifname=t0,script=no -device virtio-net-pci,netdev=n0,mac=52:54:00:AB:00:01 " +
		"-netdev user,id=n1 -device e1000,netdev=n1 -netdev bridge,id=n2,br=lan -device e1000,netdev=n2")...)
	p, _ := build(t, rec, Options{})
	want := []netid.NIC{{MAC: "52:54:00:ab:00:01", Netdev: "n0", Type: "tap", Ifname: "t0", Alone: true},
		{MAC: "52:54:00:12:34:57", Netdev: "n2", Type: "bridge", Bridge: "lan"}}
	if !slices.Equal(p.NICs, want) {
		t.Errorf("got  %+v\nwant %+v", p.NICs, want)
	}
	// A clone's running guest goes by the original's address wherever it is put.
	p, args := build(t, rec, Options{CloneID: "k7", Map: maps(t, "t0=t1")})
	want = []netid.NIC{{MAC: "52:54:00:ab:00:01", Netdev: "n0", Type: "tap", Ifname: "t1", Alone: true}}
	if !slices.Equal(p.NICs, want) || strings.Contains(strings.Join(args, " "), "52:54:00:AB") {
		t.Errorf("got  %+v of %q\nwant %+v", p.NICs, args, want)
	}
	rec.UID = 107
	if _, err := Build(rec, Options{CloneID: "k7", RunDir: runDir}); !problem.Is(err, problem.Refused) {
		t.Errorf("a clone whose card needs a tap that its user may not make: %v", err)
	}
}

// TestOldSockets: character devices in the old syntax have no ids, and their paths
// commas that are doubled.
func TestOldSockets(t *testing.T) {
	rec := recorded(words("-machine pc-q35-7.2 -serial unix:/run/a.sock,server,nowait -serial unix:/run/b.sock,server,nowait " +
		"-serial file:/a.log -serial file:/b.log -qmp unix:/run/web,,1.sock,server,nowait")...)
	p, args := build(t, rec, Options{CloneID: "k7"})
	seen := map[string]bool{}
	for _, a := range args {
		if strings.Contains(a, ownDir) {
			if path := a[strings.Index(a, ownDir):]; seen[path] {
				t.Errorf("two devices share %s", path)
			} else {
				seen[path] = true
			}
		}
	}
	if len(seen) != 5 {
		t.Errorf("%q", args)
	}
	if !slices.Contains(p.OldUnix, "/run/web,1.sock") {
		t.Errorf("the original's sockets: %q", p.OldUnix)
	}
	_, args = build(t, rec, Options{Map: maps(t, "/run/a.sock=/run/x,y", "/run/web,1.sock=/run/w")})
	for _, want := range []string{"unix:path=/run/x,,y,server,nowait", "unix:/run/w,server,nowait"} {
		if !slices.Contains(args, want) {
			t.Errorf("no %q in %q", want, args)
		}
	}
}
