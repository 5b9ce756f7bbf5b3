package uffdtest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
)

// skip is the only place that skips a test. It names what is missing. With
// UFFD_TEST_NO_SKIP=1 in the environment it fails instead.
func skip(t testing.TB, format string, args ...any) {
	t.Helper()
	missing := fmt.Sprintf(format, args...)
	if os.Getenv("UFFD_TEST_NO_SKIP") == "1" {
		t.Fatalf("missing, and UFFD_TEST_NO_SKIP=1: %s", missing)
	}
	t.Skipf("missing: %s", missing)
}

// Require skips t unless the kernel offers all of want. It fails t if this
// kernel ought to offer what it does not.
func Require(t testing.TB, want uffd.Features) {
	t.Helper()
	offered, err := uffd.Probe()
	if err != nil {
		t.Fatalf("probing: %v", err)
	}
	require(t, want, offered)
}

func require(t testing.TB, want, offered uffd.Features) {
	t.Helper()
	if (want & offered).Has(uffd.FeaturePagefaultFlagWP) {
		FalseWP.Avoid(t)
	}
	missing := want &^ offered
	if missing == 0 {
		return
	}
	if mask, ok := ExpectedMask(); ok && missing&mask != 0 {
		t.Fatalf("this kernel should offer %v (UFFD_TEST_MASK=%#x), but offers %v", missing&mask, uint64(mask), offered)
	}
	major, minor := Kernel()
	for bit := uffd.Features(1); bit != 0; bit <<= 1 {
		if missing.Has(bit) && atLeast(major, minor, bit.Since()) && !lacks(bit, major, minor) {
			t.Fatalf("Linux %d.%d on %s should offer %v (since %s), but offers %v",
				major, minor, runtime.GOARCH, bit, bit.Since(), offered)
		}
	}
	skip(t, "kernel feature %v (Linux %s)", missing, missing.Since())
}

// RequireKernel skips t on kernels before the given version. It is for what no
// feature bit announces.
func RequireKernel(t testing.TB, major, minor int, what string) {
	t.Helper()
	haveMajor, haveMinor := Kernel()
	if haveMajor < major || haveMajor == major && haveMinor < minor {
		skip(t, "%s (Linux %d.%d)", what, major, minor)
	}
}

// RequireArch skips t on the named architectures.
func RequireArch(t testing.TB, what string, lacking ...string) {
	t.Helper()
	for _, arch := range lacking {
		if runtime.GOARCH == arch {
			skip(t, "%s on %s", what, arch)
		}
	}
}

// RequireAllFaults skips t unless the user may trap faults in kernel mode.
func RequireAllFaults(t testing.TB) {
	t.Helper()
	f, err := uffd.Open(uffd.AllFaults)
	if err != nil {
		skipForbidden(t, err, "permission to trap kernel faults (root, or vm.unprivileged_userfaultfd=1)")
	}
	f.Close()
}

// skipForbidden skips t if err is a lack of permission, and fails it if it is
// anything else.
func skipForbidden(t testing.TB, err error, permission string) {
	t.Helper()
	if !errors.Is(err, fs.ErrPermission) {
		t.Fatal(err)
	}
	skip(t, "%s", permission)
}

// RequireUserFaults skips t unless the kernel can trap user faults alone.
func RequireUserFaults(t testing.TB) {
	t.Helper()
	RequireKernel(t, 5, 11, "UFFD_USER_MODE_ONLY")
}

// RequireRoot skips t for other users than root.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		skip(t, "root")
	}
}

// RequireFile skips t unless path exists; since is the kernel that brought it,
// or "" if it depends on the configuration.
func RequireFile(t testing.TB, path, since string) {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		major, minor := Kernel()
		if since != "" && atLeast(major, minor, since) {
			t.Fatalf("Linux %d.%d should have %s", major, minor, path)
		}
		skip(t, "%s", path)
	}
}

// Kernel returns the version of the running kernel.
func Kernel() (major, minor int) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		panic(err)
	}
	fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	return major, minor
}

func atLeast(major, minor int, version string) bool {
	var wantMajor, wantMinor int
	if n, _ := fmt.Sscanf(version, "%d.%d", &wantMajor, &wantMinor); n != 2 {
		return false
	}
	return major > wantMajor || major == wantMajor && minor >= wantMinor
}

const (
	writeProtection = uffd.FeaturePagefaultFlagWP | uffd.FeatureWPHugetlbfsShmem | uffd.FeatureWPUnpopulated |
		uffd.FeatureWPAsync | uffd.FeatureRWP | uffd.FeatureRWPAsync
	minorFaults = uffd.FeatureMinorHugetlbfs | uffd.FeatureMinorShmem
)

// lacks reports whether this architecture is known to lack a feature that the
// version has elsewhere.
func lacks(bit uffd.Features, major, minor int) bool {
	switch runtime.GOARCH {
	case "amd64":
		return false
	case "arm64":
		return bit&writeProtection != 0 && !atLeast(major, minor, "6.10")
	case "riscv64", "loong64": // riscv64 has write protection with some CPUs
		return bit&writeProtection != 0 || bit&minorFaults != 0 && !atLeast(major, minor, "6.12")
	case "386": // has everything on a 64-bit kernel
		return Machine() != "x86_64" && bit&(writeProtection|minorFaults) != 0
	}
	return bit&(writeProtection|minorFaults) != 0
}

// Machine returns the kernel's architecture, which may be wider than GOARCH.
func Machine() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		panic(err)
	}
	return unix.ByteSliceToString(u.Machine[:])
}

// ExpectedMask returns the features that the environment says this kernel has
// to offer (UFFD_TEST_MASK, set by the kernel matrix).
func ExpectedMask() (uffd.Features, bool) {
	mask, err := strconv.ParseUint(os.Getenv("UFFD_TEST_MASK"), 0, 64)
	return uffd.Features(mask), err == nil
}
