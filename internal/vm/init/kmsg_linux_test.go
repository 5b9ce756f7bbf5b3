package main

import (
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestKernelLog(t *testing.T) {
	type read struct {
		record string
		err    error
		more   bool
	}
	message := func(text string) read { return read{record: "4,1,2,-;" + text + "\n", more: true} }
	overwritten := read{err: unix.EPIPE, more: true}
	end := read{err: unix.EAGAIN}
	for _, test := range []struct {
		name  string
		reads []read
		want  []string
	}{
		{"nothing", []read{end}, nil},
		{"well", []read{message("usb 1-1: new"), {err: unix.EINTR, more: true}, message("x"), end}, nil},
		{"a bug and what follows", []read{message("before"), message("BUG: x"), message("stack"), end}, []string{"BUG: x", "stack"}},
		{"of a program", []read{{record: "12,1,2,-;BUG: x\n", more: true}, end}, nil},
		{"overwritten", []read{overwritten, message("after"), end}, []string{"vm: the kernel has overwritten messages before they were read", "after"}},
		{"cannot be read", []read{{err: unix.EINVAL}}, []string{"vm: read /dev/kmsg: invalid argument"}},
	} {
		var k kernelLog
		for _, r := range test.reads {
			if more := k.add([]byte(r.record), r.err); more != r.more {
				t.Errorf("%s: after %q, %v: more %v", test.name, r.record, r.err, more)
			}
		}
		if !slices.Equal(k.bad, test.want) {
			t.Errorf("%s: bad is %q, want %q", test.name, k.bad, test.want)
		}
	}
	var k kernelLog
	for range 1000 {
		k.add([]byte("4,1,2,-;BUG: x\n"), nil)
	}
	if len(k.bad) != 100 {
		t.Errorf("%d messages are kept", len(k.bad))
	}
}
