package handoff

import (
	"encoding/binary"
	"io"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// framed puts the length in front.
func framed(body string) string {
	return string(binary.LittleEndian.AppendUint32(nil, uint32(len(body)))) + body
}

const (
	chHandoff = `{"type":"handoff","version":0,"vmm_pid":4242,"mode":"MISSING|WP","regions":[` +
		`{"guest_phys_addr":0,"host_virt_addr":1048576,"size":131072,"backing_file_offset":0},` +
		`{"guest_phys_addr":4294967296,"host_virt_addr":2097152,"size":65536,"backing_file_offset":131072}]}`
	chAdd = `{"type":"add_region","region":{"guest_phys_addr":8589934592,"host_virt_addr":4194304,"size":65536,"backing_file_offset":196608}}`
)

var chRegions = []CloudHypervisorRegion{
	{region(0x100000, 0x20000, 0, 0), 0},
	{region(0x200000, 0x10000, 0x20000, 0), 1 << 32},
}

var chAdded = CloudHypervisorRegion{region(0x400000, 0x10000, 0x30000, 0), 2 << 32}

func TestDecodeCloudHypervisor(t *testing.T) {
	for _, read := range []func(io.Reader) io.Reader{
		func(r io.Reader) io.Reader { return r },
		iotest.OneByteReader,
	} {
		c := &CloudHypervisor{memorySize: 0x40000}
		if err := c.decodeHandoff(read(strings.NewReader(framed(chHandoff)))); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(c.Regions, chRegions) || c.Pid != 4242 || c.Mode != "MISSING|WP" {
			t.Errorf("got %+v", c)
		}
		added, over, err := c.decodeAddRegion(read(strings.NewReader(framed(chAdd))))
		if added != chAdded || over || err != nil {
			t.Errorf("added %+v, %v, %v", added, over, err)
		}
		if _, over, err := c.decodeAddRegion(read(strings.NewReader(""))); !over || err == nil {
			t.Errorf("at the end: %v, %v", over, err)
		}
		for i := 1; i < len(framed(chAdd)); i++ {
			if _, over, err := c.decodeAddRegion(read(strings.NewReader(framed(chAdd)[:i]))); over || err == nil {
				t.Errorf("cut after %d bytes: %v, %v", i, over, err)
			}
		}
	}
}

func TestDecodeCloudHypervisorRefuses(t *testing.T) {
	change := func(old, new string) string { return framed(strings.Replace(chHandoff, old, new, 1)) }
	const one = `{"guest_phys_addr":0,"host_virt_addr":1048576,"size":131072,"backing_file_offset":0}`
	for _, test := range []struct{ name, message, want string }{
		{"length 0", "\x00\x00\x00\x00", "a length of 0"},
		{"length above the limit", "\x01\x00\x10\x00{", "a length of 1048577"},
		{"not JSON", framed("hello"), "invalid character"},
		{"more than JSON", framed(chHandoff + "x"), "invalid character"},
		{"wrong type", change("handoff", "handover"), `"handover"`},
		{"later version", change(`"version":0`, `"version":1`), "version"},
		{"no version", change(`"version":0,`, ``), "version"},
		{"no regions", framed(`{"type":"handoff","version":0,"regions":[]}`), "no regions"},
		{"no address", change(`"host_virt_addr":1048576,`, ""), "is missing"},
		{"no guest address", change(`"guest_phys_addr":0,`, ""), "is missing"},
		{"null size", change(`"size":131072`, `"size":null`), "is missing"},
		{"no offset", change(`,"backing_file_offset":131072`, ""), "is missing"},
		{"unaligned", change("1048576", "1048577"), "whole pages"},
		{"overlap", change("2097152", "1114112"), "overlap"},
		{"wraps", change("2097152", "18446744073709486080"), "wraps"},
		{"outside", change(`"backing_file_offset":131072`, `"backing_file_offset":262144`), "outside of the memory file"},
		{"offset above 63 bits", change(`"backing_file_offset":131072`, `"backing_file_offset":9223372036854775808`), "its offset is"},
		{"too many", framed(`{"type":"handoff","version":0,"regions":[` + one + strings.Repeat(","+one, maxRegions) + `]}`), "more than 4096"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := &CloudHypervisor{memorySize: 0x40000}
			err := c.decodeHandoff(strings.NewReader(test.message))
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
		})
	}
	for _, test := range []struct{ name, message, want string }{
		{"handoff", framed(chHandoff), `"handoff"`},
		{"no region", framed(`{"type":"add_region"}`), "no region"},
		{"nothing in it", framed(`{"type":"add_region","region":{}}`), "is missing"},
		{"overlap", framed(strings.Replace(chAdd, "4194304", "1048576", 1)), "overlap"},
		{"outside", framed(strings.Replace(chAdd, "196608", "262144", 1)), "outside of the memory file"},
	} {
		t.Run("add "+test.name, func(t *testing.T) {
			c := &CloudHypervisor{memorySize: 0x40000, Regions: chRegions}
			_, over, err := c.decodeAddRegion(strings.NewReader(test.message))
			if over || err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, %v, want an error with %q", over, err, test.want)
			}
		})
	}
}

func FuzzCloudHypervisorHandoff(f *testing.F) {
	f.Add([]byte(framed(chHandoff)), int64(0x40000))
	f.Fuzz(func(t *testing.T, message []byte, memorySize int64) {
		c := &CloudHypervisor{memorySize: memorySize}
		if c.decodeHandoff(strings.NewReader(string(message))) == nil {
			sound(t, c.regions(), memorySize)
		}
	})
}

func FuzzCloudHypervisorAddRegion(f *testing.F) {
	f.Add([]byte(framed(chAdd)))
	f.Fuzz(func(t *testing.T, message []byte) {
		c := &CloudHypervisor{memorySize: math.MaxInt64, Regions: chRegions}
		added, over, err := c.decodeAddRegion(strings.NewReader(string(message)))
		if over != (len(message) == 0) {
			t.Fatalf("over = %v of %d bytes", over, len(message))
		}
		if err == nil {
			sound(t, append(c.regions(), added.Region), math.MaxInt64)
		}
	})
}
