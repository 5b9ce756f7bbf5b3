package uffd

import (
	"math/bits"
	"strconv"
	"strings"
)

// Features is a set of userfaultfd features (UFFD_FEATURE_*), as offered by
// a kernel or enabled on a descriptor by [File.API]. Bits that this package
// does not know are kept.
type Features uint64

// The features of Linux 7.3. Some only announce that the kernel can do
// something: enabling them changes nothing, but negotiation fails where they
// are missing. The doc of each says so.
const (
	// FeaturePagefaultFlagWP says that write protection exists
	// (UFFD_FEATURE_PAGEFAULT_FLAG_WP, Linux 5.7). It only announces.
	// Linux 5.10 offers it on every architecture, although write faults are
	// reported on amd64 alone there.
	FeaturePagefaultFlagWP Features = 1 << 0

	// FeatureEventFork delivers [EventFork] with a descriptor for the child
	// (UFFD_FEATURE_EVENT_FORK, Linux 4.11). Asking for it needs
	// CAP_SYS_PTRACE in the initial user namespace.
	FeatureEventFork Features = 1 << 1

	// FeatureEventRemap delivers [EventRemap] and keeps memory registered
	// across mremap(2); without it mremap drops the registration
	// (UFFD_FEATURE_EVENT_REMAP, Linux 4.11).
	FeatureEventRemap Features = 1 << 2

	// FeatureEventRemove delivers [EventRemove] before madvise(2) with
	// MADV_DONTNEED, MADV_FREE or MADV_REMOVE discards pages
	// (UFFD_FEATURE_EVENT_REMOVE, Linux 4.11).
	FeatureEventRemove Features = 1 << 3

	// FeatureMissingHugetlbfs says that [RegisterMissing] works on hugetlb
	// memory (UFFD_FEATURE_MISSING_HUGETLBFS, Linux 4.11). It only announces.
	FeatureMissingHugetlbfs Features = 1 << 4

	// FeatureMissingShmem says that [RegisterMissing] works on shared memory
	// (UFFD_FEATURE_MISSING_SHMEM, Linux 4.11). It only announces.
	FeatureMissingShmem Features = 1 << 5

	// FeatureEventUnmap delivers [EventUnmap] after memory was unmapped
	// (UFFD_FEATURE_EVENT_UNMAP, Linux 4.11).
	FeatureEventUnmap Features = 1 << 6

	// FeatureSigbus makes faults raise SIGBUS in the faulting thread instead
	// of being queued as messages (UFFD_FEATURE_SIGBUS, Linux 4.14).
	FeatureSigbus Features = 1 << 7

	// FeatureThreadID fills [Pagefault].ThreadID
	// (UFFD_FEATURE_THREAD_ID, Linux 4.14).
	FeatureThreadID Features = 1 << 8

	// FeatureMinorHugetlbfs says that [RegisterMinor] works on hugetlb memory
	// (UFFD_FEATURE_MINOR_HUGETLBFS, Linux 5.13). It only announces.
	FeatureMinorHugetlbfs Features = 1 << 9

	// FeatureMinorShmem says that [RegisterMinor] works on shared memory
	// (UFFD_FEATURE_MINOR_SHMEM, Linux 5.14). It only announces.
	FeatureMinorShmem Features = 1 << 10

	// FeatureExactAddress reports the exact address of a fault instead of its
	// page (UFFD_FEATURE_EXACT_ADDRESS, Linux 5.18). On s390x the machine itself
	// tells the page only; so do some 32-bit ARM kernels before 6.12.
	FeatureExactAddress Features = 1 << 11

	// FeatureWPHugetlbfsShmem says that [RegisterWP] works on hugetlb and
	// shared memory (UFFD_FEATURE_WP_HUGETLBFS_SHMEM, Linux 5.19). It only
	// announces.
	FeatureWPHugetlbfsShmem Features = 1 << 12

	// FeatureWPUnpopulated makes [File.WriteProtect] protect pages of private
	// anonymous memory that do not exist yet
	// (UFFD_FEATURE_WP_UNPOPULATED, Linux 6.4). Shared memory and hugetlb do
	// so without it.
	FeatureWPUnpopulated Features = 1 << 13

	// FeaturePoison says that [File.Poison] exists
	// (UFFD_FEATURE_POISON, Linux 6.6). It only announces.
	FeaturePoison Features = 1 << 14

	// FeatureWPAsync makes the kernel resolve write-protect faults itself and
	// leave the page marked as written for PAGEMAP_SCAN
	// (UFFD_FEATURE_WP_ASYNC, Linux 6.7). It turns on FeatureWPUnpopulated,
	// and lets almost any memory be registered with [RegisterWP] alone.
	FeatureWPAsync Features = 1 << 15

	// FeatureMove says that [File.Move] exists
	// (UFFD_FEATURE_MOVE, Linux 6.8). It only announces.
	FeatureMove Features = 1 << 16

	// FeatureRWP lets memory be registered with [RegisterRWP], which traps
	// every access to a protected page (UFFD_FEATURE_RWP, Linux 7.3).
	FeatureRWP Features = 1 << 17

	// FeatureRWPAsync makes the kernel resolve those faults itself and leave
	// the page marked as accessed for PAGEMAP_SCAN
	// (UFFD_FEATURE_RWP_ASYNC, Linux 7.3). It needs FeatureRWP, and
	// [File.SetMode] turns it on and off.
	FeatureRWPAsync Features = 1 << 18
)

// Ioctls is a set of userfaultfd operations. Bit n stands for the ioctl with
// number n (1 << _UFFDIO_*), as the kernel reports them from UFFDIO_API and
// UFFDIO_REGISTER. Bits that this package does not know are kept.
type Ioctls uint64

// The operations of Linux 7.3.
const (
	IoctlRegister     Ioctls = 1 << 0x00 // UFFDIO_REGISTER: [File.Register]
	IoctlUnregister   Ioctls = 1 << 0x01 // UFFDIO_UNREGISTER: [File.Unregister]
	IoctlWake         Ioctls = 1 << 0x02 // UFFDIO_WAKE: [File.Wake]
	IoctlCopy         Ioctls = 1 << 0x03 // UFFDIO_COPY: [File.Copy]
	IoctlZeroPage     Ioctls = 1 << 0x04 // UFFDIO_ZEROPAGE: [File.ZeroPage]
	IoctlMove         Ioctls = 1 << 0x05 // UFFDIO_MOVE: [File.Move]
	IoctlWriteProtect Ioctls = 1 << 0x06 // UFFDIO_WRITEPROTECT: [File.WriteProtect]
	IoctlContinue     Ioctls = 1 << 0x07 // UFFDIO_CONTINUE: [File.Continue]
	IoctlPoison       Ioctls = 1 << 0x08 // UFFDIO_POISON: [File.Poison]
	IoctlRWProtect    Ioctls = 1 << 0x09 // UFFDIO_RWPROTECT: [File.RWProtect]
	IoctlSetMode      Ioctls = 1 << 0x0a // UFFDIO_SET_MODE: [File.SetMode]
	IoctlAPI          Ioctls = 1 << 0x3f // UFFDIO_API: [File.API]
)

// RegisterMode says which faults of a range are reported to [File.Register]'s
// descriptor (UFFDIO_REGISTER_MODE_*).
type RegisterMode uint64

// The register modes of Linux 7.3. They combine, but for RegisterWP with
// RegisterRWP.
const (
	RegisterMissing RegisterMode = 1 << 0 // accesses to pages that do not exist (Linux 4.3)
	RegisterWP      RegisterMode = 1 << 1 // writes to write-protected pages (Linux 5.7)
	RegisterMinor   RegisterMode = 1 << 2 // accesses to pages that exist in the file but are not mapped (Linux 5.13)
	RegisterRWP     RegisterMode = 1 << 3 // accesses to protected pages (Linux 7.3)
)

// CopyMode modifies [File.Copy] (UFFDIO_COPY_MODE_*).
type CopyMode uint64

// The modes of [File.Copy].
const (
	CopyDontWake CopyMode = 1 << 0 // leave waiting threads asleep
	CopyWP       CopyMode = 1 << 1 // install the pages write-protected (Linux 5.7)
)

// ZeroPageMode modifies [File.ZeroPage] (UFFDIO_ZEROPAGE_MODE_*).
type ZeroPageMode uint64

// The mode of [File.ZeroPage].
const (
	ZeroPageDontWake ZeroPageMode = 1 << 0 // leave waiting threads asleep
)

// ContinueMode modifies [File.Continue] (UFFDIO_CONTINUE_MODE_*).
type ContinueMode uint64

// The modes of [File.Continue].
const (
	ContinueDontWake ContinueMode = 1 << 0 // leave waiting threads asleep
	ContinueWP       ContinueMode = 1 << 1 // map the pages write-protected (Linux 6.4)
)

// PoisonMode modifies [File.Poison] (UFFDIO_POISON_MODE_*).
type PoisonMode uint64

// The mode of [File.Poison].
const (
	PoisonDontWake PoisonMode = 1 << 0 // leave waiting threads asleep
)

// MoveMode modifies [File.Move] (UFFDIO_MOVE_MODE_*).
type MoveMode uint64

// The modes of [File.Move].
const (
	MoveDontWake      MoveMode = 1 << 0 // leave waiting threads asleep
	MoveAllowSrcHoles MoveMode = 1 << 1 // pass over source pages that do not exist
)

// WriteProtectMode is what [File.WriteProtect] does
// (UFFDIO_WRITEPROTECT_MODE_*). Zero removes the protection and wakes.
type WriteProtectMode uint64

// The modes of [File.WriteProtect]. They do not combine. DontWake is another
// bit here than in the calls that install pages.
const (
	WriteProtectWP       WriteProtectMode = 1 << 0 // protect
	WriteProtectDontWake WriteProtectMode = 1 << 1 // unprotect, but leave waiting threads asleep
)

// RWProtectMode is what [File.RWProtect] does (UFFDIO_RWPROTECT_MODE_*).
// Zero removes the protection and wakes.
type RWProtectMode uint64

// The modes of [File.RWProtect]. They do not combine. DontWake is another bit
// here than in the calls that install pages.
const (
	RWProtectRWP      RWProtectMode = 1 << 0 // protect
	RWProtectDontWake RWProtectMode = 1 << 1 // unprotect, but leave waiting threads asleep
)

// PagefaultFlags says what kind of access caused a [Pagefault]
// (UFFD_PAGEFAULT_FLAG_*). None of WP, Minor and RWP means that the page is
// missing. Write alone does not mean write-protected.
type PagefaultFlags uint64

// The fault flags of Linux 7.3.
const (
	PagefaultWrite PagefaultFlags = 1 << 0 // the access was a write
	PagefaultWP    PagefaultFlags = 1 << 1 // the page is write-protected (Linux 5.7)
	PagefaultMinor PagefaultFlags = 1 << 2 // the page exists in the file but is not mapped (Linux 5.13)
	PagefaultRWP   PagefaultFlags = 1 << 3 // the page is protected from every access (Linux 7.3)
)

// A kernel is the version of Linux that brought something.
type kernel struct{ major, minor int }

func (k kernel) String() string { return strconv.Itoa(k.major) + "." + strconv.Itoa(k.minor) }

func (k kernel) newer(than kernel) bool {
	return k.major > than.major || k.major == than.major && k.minor > than.minor
}

// A member is one bit of a set: its name in the kernel's header without the
// prefix, and the kernel that brought it.
type member struct {
	bit   uint64
	name  string
	since kernel
}

// The prefixes of each set's names in the kernel's header.
const (
	featurePrefix      = "UFFD_FEATURE_"
	ioctlPrefix        = "UFFDIO_"
	registerPrefix     = "UFFDIO_REGISTER_MODE_"
	copyPrefix         = "UFFDIO_COPY_MODE_"
	zeroPagePrefix     = "UFFDIO_ZEROPAGE_MODE_"
	continuePrefix     = "UFFDIO_CONTINUE_MODE_"
	poisonPrefix       = "UFFDIO_POISON_MODE_"
	movePrefix         = "UFFDIO_MOVE_MODE_"
	writeProtectPrefix = "UFFDIO_WRITEPROTECT_MODE_"
	rwProtectPrefix    = "UFFDIO_RWPROTECT_MODE_"
	pagefaultPrefix    = "UFFD_PAGEFAULT_FLAG_"
)

// sets has every bit of every set of the ABI, by the set's prefix.
var sets = map[string][]member{
	featurePrefix: {
		{uint64(FeaturePagefaultFlagWP), "PAGEFAULT_FLAG_WP", kernel{5, 7}},
		{uint64(FeatureEventFork), "EVENT_FORK", kernel{4, 11}},
		{uint64(FeatureEventRemap), "EVENT_REMAP", kernel{4, 11}},
		{uint64(FeatureEventRemove), "EVENT_REMOVE", kernel{4, 11}},
		{uint64(FeatureMissingHugetlbfs), "MISSING_HUGETLBFS", kernel{4, 11}},
		{uint64(FeatureMissingShmem), "MISSING_SHMEM", kernel{4, 11}},
		{uint64(FeatureEventUnmap), "EVENT_UNMAP", kernel{4, 11}},
		{uint64(FeatureSigbus), "SIGBUS", kernel{4, 14}},
		{uint64(FeatureThreadID), "THREAD_ID", kernel{4, 14}},
		{uint64(FeatureMinorHugetlbfs), "MINOR_HUGETLBFS", kernel{5, 13}},
		{uint64(FeatureMinorShmem), "MINOR_SHMEM", kernel{5, 14}},
		{uint64(FeatureExactAddress), "EXACT_ADDRESS", kernel{5, 18}},
		{uint64(FeatureWPHugetlbfsShmem), "WP_HUGETLBFS_SHMEM", kernel{5, 19}},
		{uint64(FeatureWPUnpopulated), "WP_UNPOPULATED", kernel{6, 4}},
		{uint64(FeaturePoison), "POISON", kernel{6, 6}},
		{uint64(FeatureWPAsync), "WP_ASYNC", kernel{6, 7}},
		{uint64(FeatureMove), "MOVE", kernel{6, 8}},
		{uint64(FeatureRWP), "RWP", kernel{7, 3}},
		{uint64(FeatureRWPAsync), "RWP_ASYNC", kernel{7, 3}},
	},
	ioctlPrefix: {
		{uint64(IoctlRegister), "REGISTER", kernel{4, 3}},
		{uint64(IoctlUnregister), "UNREGISTER", kernel{4, 3}},
		{uint64(IoctlWake), "WAKE", kernel{4, 3}},
		{uint64(IoctlCopy), "COPY", kernel{4, 3}},
		{uint64(IoctlZeroPage), "ZEROPAGE", kernel{4, 3}},
		{uint64(IoctlMove), "MOVE", kernel{6, 8}},
		{uint64(IoctlWriteProtect), "WRITEPROTECT", kernel{5, 7}},
		{uint64(IoctlContinue), "CONTINUE", kernel{5, 13}},
		{uint64(IoctlPoison), "POISON", kernel{6, 6}},
		{uint64(IoctlRWProtect), "RWPROTECT", kernel{7, 3}},
		{uint64(IoctlSetMode), "SET_MODE", kernel{7, 3}},
		{uint64(IoctlAPI), "API", kernel{4, 3}},
	},
	registerPrefix: {
		{uint64(RegisterMissing), "MISSING", kernel{4, 3}},
		{uint64(RegisterWP), "WP", kernel{5, 7}},
		{uint64(RegisterMinor), "MINOR", kernel{5, 13}},
		{uint64(RegisterRWP), "RWP", kernel{7, 3}},
	},
	copyPrefix: {
		{uint64(CopyDontWake), "DONTWAKE", kernel{4, 3}},
		{uint64(CopyWP), "WP", kernel{5, 7}},
	},
	zeroPagePrefix: {
		{uint64(ZeroPageDontWake), "DONTWAKE", kernel{4, 3}},
	},
	continuePrefix: {
		{uint64(ContinueDontWake), "DONTWAKE", kernel{5, 13}},
		{uint64(ContinueWP), "WP", kernel{6, 4}},
	},
	poisonPrefix: {
		{uint64(PoisonDontWake), "DONTWAKE", kernel{6, 6}},
	},
	movePrefix: {
		{uint64(MoveDontWake), "DONTWAKE", kernel{6, 8}},
		{uint64(MoveAllowSrcHoles), "ALLOW_SRC_HOLES", kernel{6, 8}},
	},
	writeProtectPrefix: {
		{uint64(WriteProtectWP), "WP", kernel{5, 7}},
		{uint64(WriteProtectDontWake), "DONTWAKE", kernel{5, 7}},
	},
	rwProtectPrefix: {
		{uint64(RWProtectRWP), "RWP", kernel{7, 3}},
		{uint64(RWProtectDontWake), "DONTWAKE", kernel{7, 3}},
	},
	pagefaultPrefix: {
		{uint64(PagefaultWrite), "WRITE", kernel{4, 3}},
		{uint64(PagefaultWP), "WP", kernel{5, 7}},
		{uint64(PagefaultMinor), "MINOR", kernel{5, 13}},
		{uint64(PagefaultRWP), "RWP", kernel{7, 3}},
	},
}

// names lists the bits of set as "WP|THREAD_ID|1<<40".
func names(prefix string, set uint64) string {
	if set == 0 {
		return "0"
	}
	var list []string
	for _, f := range sets[prefix] {
		if set&f.bit != 0 {
			list = append(list, f.name)
			set &^= f.bit
		}
	}
	for ; set != 0; set &= set - 1 {
		list = append(list, "1<<"+strconv.Itoa(bits.TrailingZeros64(set)))
	}
	return strings.Join(list, "|")
}

// since is the first kernel that has all of set; "" if set is empty or has
// unknown bits.
func since(prefix string, set uint64) string {
	var newest kernel
	for _, f := range sets[prefix] {
		if set&f.bit != 0 {
			set &^= f.bit
			if f.since.newer(newest) {
				newest = f.since
			}
		}
	}
	if set != 0 || newest == (kernel{}) {
		return ""
	}
	return newest.String()
}

// Has reports whether s contains all of x.
func (s Features) Has(x Features) bool { return s&x == x }

// String lists the features by the kernel's names, without the prefix
// UFFD_FEATURE_; an unknown bit n reads "1<<n".
func (s Features) String() string { return names(featurePrefix, uint64(s)) }

// Since returns the first version of Linux that has all of s, like "6.7", and
// "" if s is empty or has unknown bits. It is documentation: architecture and
// configuration decide too, so ask the kernel with [Probe], never by version.
func (s Features) Since() string { return since(featurePrefix, uint64(s)) }

// Has reports whether s contains all of x.
func (s Ioctls) Has(x Ioctls) bool { return s&x == x }

// String lists the operations by the kernel's names, without the prefix
// UFFDIO_; an unknown bit n reads "1<<n".
func (s Ioctls) String() string { return names(ioctlPrefix, uint64(s)) }

// Since returns the first version of Linux that has all of s, like "6.7", and
// "" if s is empty or has unknown bits.
func (s Ioctls) Since() string { return since(ioctlPrefix, uint64(s)) }

// Has reports whether s contains all of x.
func (s RegisterMode) Has(x RegisterMode) bool { return s&x == x }

// String lists the modes by the kernel's names.
func (s RegisterMode) String() string { return names(registerPrefix, uint64(s)) }

// Has reports whether s contains all of x.
func (s CopyMode) Has(x CopyMode) bool { return s&x == x }

// String lists the modes by the kernel's names.
func (s CopyMode) String() string { return names(copyPrefix, uint64(s)) }

// Has reports whether s contains all of x.
func (s ZeroPageMode) Has(x ZeroPageMode) bool { return s&x == x }

// String lists the modes by the kernel's names.
func (s ZeroPageMode) String() string { return names(zeroPagePrefix, uint64(s)) }

// Has reports whether s contains all of x.
func (s ContinueMode) Has(x ContinueMode) bool { return s&x == x }

// String lists the modes by the kernel's names.
func (s ContinueMode) String() string { return names(continuePrefix, uint64(s)) }

// Has reports whether s contains all of x.
func (s PoisonMode) Has(x PoisonMode) bool { return s&x == x }

// String lists the modes by the kernel's names.
func (s PoisonMode) String() string { return names(poisonPrefix, uint64(s)) }

// Has reports whether s contains all of x.
func (s MoveMode) Has(x MoveMode) bool { return s&x == x }

// String lists the modes by the kernel's names.
func (s MoveMode) String() string { return names(movePrefix, uint64(s)) }

// Has reports whether s contains all of x.
func (s WriteProtectMode) Has(x WriteProtectMode) bool { return s&x == x }

// String lists the modes by the kernel's names.
func (s WriteProtectMode) String() string { return names(writeProtectPrefix, uint64(s)) }

// Has reports whether s contains all of x.
func (s RWProtectMode) Has(x RWProtectMode) bool { return s&x == x }

// String lists the modes by the kernel's names.
func (s RWProtectMode) String() string { return names(rwProtectPrefix, uint64(s)) }

// Has reports whether s contains all of x.
func (s PagefaultFlags) Has(x PagefaultFlags) bool { return s&x == x }

// String lists the flags by the kernel's names.
func (s PagefaultFlags) String() string { return names(pagefaultPrefix, uint64(s)) }
