package image

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ckagent/ckagent/agent/problem"
)

const (
	diskID    = "20261121T234612123-4f3a9c1e"
	diskOlder = "20261121T233112123-00c0ffee"
)

// diskManifest is a manifest with a chain of two volumes and a disk left out.
func diskManifest(t testing.TB) *Manifest {
	t.Helper()
	m, _ := encoded(t)
	m.ID = diskID
	m.Disks = []Disk{
		{Name: "vd0", Device: "vd0", Node: "#block042", QOMPath: "/machine/peripheral/d/virtio-backend", Type: "virtio-blk-device",
			Format: "qcow2", Path: "/img/a.qcow2", SizeBytes: 1 << 30, Method: DiskBackup, Content: ContentGuest,
			Volumes: []Volume{{VolumeName(diskID, 0), 327680, 1}, {VolumeName(diskOlder, 0), 1 << 20, 2}}},
		{Name: "scratch", Format: "raw", Path: "/img/b", SizeBytes: 512, Method: DiskNone, Content: ContentGuest},
	}
	m.Stats.DiskBytes = 327680
	return m
}

func TestManifestDisks(t *testing.T) {
	m := diskManifest(t)
	data, err := EncodeManifest(m)
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeManifest("x", data)
	if err != nil {
		t.Fatal(err)
	}
	m.Requires, m.Disks[1].Volumes, m.CreatedAt = []string{FeatureDisks}, []Volume{}, m.CreatedAt.UTC()
	if diff := cmp.Diff(m, got); diff != "" {
		t.Error(diff)
	}
	if n := got.VolumeNames(); len(n) != 2 {
		t.Errorf("volumes %v", n)
	}
	for name, c := range map[string][2]string{
		"not required":         {`    "disks"` + "\n", ``},
		"volume outside":       {`"` + VolumeName(diskOlder, 0), `"../` + VolumeName(diskOlder, 0)},
		"volume twice":         {VolumeName(diskOlder, 0), VolumeName(diskID, 0)},
		"another's volume":     {VolumeName(diskID, 0), VolumeName("20261121T234612123-4f3a9c1f", 0)},
		"backup of nothing":    {`"method": "none"`, `"method": "backup"`},
		"unknown method":       {`"method": "none"`, `"method": "copy"`},
		"unknown content":      {`"content": "raw"`, `"content": "text"`},
		"snapshot of no name":  {`"method": "none"`, `"method": "snapshot"`},
		"two disks of a name":  {`"name": "scratch"`, `"name": "vd0"`},
		"size of the volumes":  {`"disk_bytes": 327680`, `"disk_bytes": 327681`},
		"a volume of no bytes": {`"bytes": 1048576`, `"bytes": 0`},
	} {
		changed := strings.Replace(string(data), c[0], c[1], 1)
		if changed == string(data) {
			t.Fatalf("%s: nothing to change", name)
		}
		raw := []byte(changed)
		seal(raw)
		if _, err := DecodeManifest("x", raw); !problem.Is(err, problem.Integrity) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestVolumeOwner(t *testing.T) {
	if id, ok := VolumeOwner(VolumeName(diskID, 12)); !ok || id != diskID {
		t.Errorf("owner %q, %v", id, ok)
	}
	for _, bad := range []string{"", "x.qcow2", diskID + ".qcow2", diskID + "-0.qcow2/", "../" + VolumeName(diskID, 0), diskID + "-a.qcow2"} {
		if id, ok := VolumeOwner(bad); ok {
			t.Errorf("%q belongs to %q", bad, id)
		}
	}
}
