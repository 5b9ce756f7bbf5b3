package uffdtest

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
)

// A verdict is a test that panics with the way it would end.
type verdict struct{ testing.TB }

func (v *verdict) Helper() {}

func (v *verdict) Fatal(args ...any) { panic("fail: " + fmt.Sprint(args...)) }

func (v *verdict) Fatalf(format string, args ...any) { panic("fail: " + fmt.Sprintf(format, args...)) }

func (v *verdict) Skipf(format string, args ...any) { panic("skip: " + fmt.Sprintf(format, args...)) }

// judge returns what gate does to a test: "" if it goes on.
func judge(t *testing.T, gate func(t testing.TB)) (said string) {
	defer func() {
		if p := recover(); p != nil {
			said = p.(string)
		}
	}()
	gate(&verdict{t})
	return ""
}

// TestGates has no gate skip where the kernel has what is asked for.
func TestGates(t *testing.T) {
	const (
		unknown = uffd.Features(1) << 63
		old     = uffd.FeatureMissingShmem // of every kernel that this library knows, anywhere
	)
	t.Setenv("UFFD_TEST_NO_SKIP", "")
	forbidden := fmt.Errorf("open: %w", unix.EPERM)
	for _, test := range []struct {
		name string
		mask string // what the environment says
		gate func(t testing.TB)
		want string // that the verdict begins with
	}{
		{"offered", "", func(t testing.TB) { require(t, old, old|unknown) }, ""},
		{"not offered", "", func(t testing.TB) { require(t, unknown, old) }, "skip: missing: kernel feature 1<<63"},
		{"not offered, nor in the mask", "0x1", func(t testing.TB) { require(t, unknown, old) }, "skip: missing: kernel feature 1<<63"},
		{"in the mask and not offered", "0x8000000000000001", func(t testing.TB) { require(t, unknown, old) }, "fail: this kernel should offer 1<<63"},
		{"of an older kernel and not offered", "", func(t testing.TB) { require(t, old, 0) }, "fail: Linux "},
		{"one of two", "", func(t testing.TB) { require(t, old|unknown, unknown) }, "fail: Linux "},
		{"older kernel", "", func(t testing.TB) { RequireKernel(t, 4, 11, "x") }, ""},
		{"newer kernel", "", func(t testing.TB) { RequireKernel(t, 1000, 0, "x") }, "skip: missing: x (Linux 1000.0)"},
		{"file", "", func(t testing.TB) { RequireFile(t, "/proc/self", "4.11") }, ""},
		{"file that there is not", "", func(t testing.TB) { RequireFile(t, "/none", "1000.0") }, "skip: missing: /none"},
		{"file that there ought to be", "", func(t testing.TB) { RequireFile(t, "/none", "4.11") }, "fail: Linux "},
		{"forbidden", "", func(t testing.TB) { skipForbidden(t, forbidden, "permission") }, "skip: missing: permission"},
		{"broken", "", func(t testing.TB) { skipForbidden(t, unix.EINVAL, "permission") }, "fail: invalid argument"},
		{"bug of another kernel", "", func(t testing.TB) { avoid(t, false, true) }, ""},
		{"bug", "", func(t testing.TB) { avoid(t, true, true) }, "skip: missing: a kernel without this bug: x"},
		{"bug that is not listed", "", func(t testing.TB) { avoid(t, true, false) }, "fail: not in the list"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv("UFFD_TEST_MASK", test.mask)
			got := judge(t, test.gate)
			if !strings.HasPrefix(got, test.want) || test.want == "" && got != "" {
				t.Errorf("got %q, want %q", got, test.want)
			}
			if strings.HasPrefix(got, "skip: ") {
				t.Setenv("UFFD_TEST_NO_SKIP", "1")
				if got := judge(t, test.gate); !strings.HasPrefix(got, "fail: missing, and ") {
					t.Errorf("with UFFD_TEST_NO_SKIP=1: %q", got)
				}
			}
		})
	}
	if !errors.Is(forbidden, fs.ErrPermission) {
		t.Errorf("%v is no lack of permission", forbidden)
	}
}

func avoid(t testing.TB, here, listed bool) {
	b := &Bug{What: "x", Here: func() bool { return here }}
	if listed {
		defer func(all []*Bug) { Bugs = all }(Bugs)
		Bugs = append(Bugs[:len(Bugs):len(Bugs)], b)
	}
	b.Avoid(t)
}
