package uffd

import (
	"fmt"
	"go/types"
	"maps"
	"strconv"
	"strings"
	"testing"

	"github.com/go-uffd/uffd/internal/golden"
)

// TestGoldenABI compares this package, as the compiler sees it on each
// architecture, with what a C compiler says of the kernel's header.
func TestGoldenABI(t *testing.T) {
	golden.Compare(t, "testdata", "<linux/userfaultfd.h>", 100, describe)
}

// structs names the mirrors of the kernel's structures. The fields of an embedded
// range are those of uffdio_range.
var structs = map[string]string{
	"uffdio_api":          "uffdioAPI",
	"uffdio_range":        "uffdioRange",
	"uffdio_register":     "uffdioRegister",
	"uffdio_copy":         "uffdioCopy",
	"uffdio_zeropage":     "uffdioZeropage",
	"uffdio_continue":     "uffdioContinue",
	"uffdio_poison":       "uffdioPoison",
	"uffdio_move":         "uffdioMove",
	"uffdio_writeprotect": "uffdioWriteprotect",
	"uffdio_rwprotect":    "uffdioRWProtect",
	"uffdio_set_mode":     "uffdioSetMode",
}

// fields has the kernel's names of the fields that we call otherwise.
var fields = map[string]string{"rng": "range", "copied": "copy", "zeroed": "zeropage", "moved": "move"}

// constants names the package's constants that are not members of a set.
var constants = map[string]string{
	"const UFFD_API":            "uffdAPI",
	"const UFFD_USER_MODE_ONLY": "userModeOnly",
	"const UFFDIO":              "iocType",
	"const USERFAULTFD_IOC":     "iocType",

	"const UFFD_EVENT_PAGEFAULT": "EventPagefault",
	"const UFFD_EVENT_FORK":      "EventFork",
	"const UFFD_EVENT_REMAP":     "EventRemap",
	"const UFFD_EVENT_REMOVE":    "EventRemove",
	"const UFFD_EVENT_UNMAP":     "EventUnmap",

	"request UFFDIO_API":          "reqAPI",
	"request UFFDIO_REGISTER":     "reqRegister",
	"request UFFDIO_UNREGISTER":   "reqUnregister",
	"request UFFDIO_WAKE":         "reqWake",
	"request UFFDIO_COPY":         "reqCopy",
	"request UFFDIO_ZEROPAGE":     "reqZeroPage",
	"request UFFDIO_MOVE":         "reqMove",
	"request UFFDIO_WRITEPROTECT": "reqWriteProtect",
	"request UFFDIO_CONTINUE":     "reqContinue",
	"request UFFDIO_POISON":       "reqPoison",
	"request UFFDIO_RWPROTECT":    "reqRWProtect",
	"request UFFDIO_SET_MODE":     "reqSetMode",
	"request USERFAULTFD_IOC_NEW": "reqNew",

	"sizeof uffd_msg":                           "msgSize",
	"offsetof uffd_msg.event":                   "msgEvent",
	"offsetof uffd_msg.arg.pagefault.flags":     "pagefaultFlags",
	"offsetof uffd_msg.arg.pagefault.address":   "pagefaultAddress",
	"offsetof uffd_msg.arg.pagefault.feat.ptid": "pagefaultThreadID",
	"offsetof uffd_msg.arg.fork.ufd":            "forkFD",
	"offsetof uffd_msg.arg.remap.from":          "remapFrom",
	"offsetof uffd_msg.arg.remap.to":            "remapTo",
	"offsetof uffd_msg.arg.remap.len":           "remapLen",
	"offsetof uffd_msg.arg.remove.start":        "removeStart",
	"offsetof uffd_msg.arg.remove.end":          "removeEnd",
}

// decoded is how wide the decoders of Msg read, and what holds the fields.
var decoded = map[string]uint64{
	"sizeof uffd_msg.event":                   1,
	"offsetof uffd_msg.arg":                   8,
	"sizeof uffd_msg.arg":                     24,
	"offsetof uffd_msg.arg.pagefault":         8,
	"sizeof uffd_msg.arg.pagefault":           24,
	"sizeof uffd_msg.arg.pagefault.flags":     8,
	"sizeof uffd_msg.arg.pagefault.address":   8,
	"offsetof uffd_msg.arg.pagefault.feat":    24,
	"sizeof uffd_msg.arg.pagefault.feat":      4,
	"sizeof uffd_msg.arg.pagefault.feat.ptid": 4,
	"offsetof uffd_msg.arg.fork":              8,
	"sizeof uffd_msg.arg.fork":                4,
	"sizeof uffd_msg.arg.fork.ufd":            4,
	"offsetof uffd_msg.arg.remap":             8,
	"sizeof uffd_msg.arg.remap":               24,
	"sizeof uffd_msg.arg.remap.from":          8,
	"sizeof uffd_msg.arg.remap.to":            8,
	"sizeof uffd_msg.arg.remap.len":           8,
	"offsetof uffd_msg.arg.remove":            8,
	"sizeof uffd_msg.arg.remove":              16,
	"sizeof uffd_msg.arg.remove.start":        8,
	"sizeof uffd_msg.arg.remove.end":          8,

	// The kernel's own unions of sets, of ours.
	"const UFFD_API_FEATURES":           uint64(knownFeatures()),
	"const UFFD_API_REGISTER_MODES":     uint64(RegisterMissing | RegisterWP | RegisterMinor | RegisterRWP),
	"const UFFD_API_IOCTLS":             uint64(IoctlAPI | IoctlRegister | IoctlUnregister | IoctlSetMode),
	"const UFFD_API_RANGE_IOCTLS":       uint64(IoctlWake | IoctlCopy | IoctlZeroPage | IoctlMove | IoctlWriteProtect | IoctlContinue | IoctlPoison | IoctlRWProtect),
	"const UFFD_API_RANGE_IOCTLS_BASIC": uint64(IoctlWake | IoctlCopy | IoctlWriteProtect | IoctlContinue | IoctlPoison | IoctlRWProtect),
}

// describe lists what the package has, by the kernel's names.
func describe(p *golden.Package) map[string]uint64 {
	ours := maps.Clone(decoded)
	for item, name := range constants {
		ours[item] = p.Constant(name)
	}
	for name, mirror := range structs {
		var pointers []string
		if name == "uffdio_copy" {
			pointers = []string{"src"}
		}
		p.Struct(ours, name, mirror, fields, pointers...)
	}
	for prefix, set := range sets {
		for _, f := range set {
			if prefix == ioctlPrefix { // the kernel has numbers, we have bits
				n, _ := strconv.Atoi(strings.TrimPrefix(names("", f.bit), "1<<"))
				ours["const _UFFDIO_"+f.name] = uint64(n)
				continue
			}
			ours["const "+prefix+f.name] = f.bit
		}
	}
	return ours
}

// TestSetsAreComplete checks that every exported constant of a set's type
// stands among its members.
func TestSetsAreComplete(t *testing.T) {
	prefixes := map[string]string{
		"Features": featurePrefix, "Ioctls": ioctlPrefix, "RegisterMode": registerPrefix,
		"CopyMode": copyPrefix, "ZeroPageMode": zeroPagePrefix, "ContinueMode": continuePrefix,
		"PoisonMode": poisonPrefix, "MoveMode": movePrefix, "WriteProtectMode": writeProtectPrefix,
		"RWProtectMode": rwProtectPrefix, "PagefaultFlags": pagefaultPrefix,
	}
	if len(prefixes) != len(sets) {
		t.Errorf("%d types for %d sets", len(prefixes), len(sets))
	}
	pkg := golden.Check(t, "amd64")
	count := make(map[string]int)
	for _, name := range pkg.Scope.Names() {
		c, ok := pkg.Scope.Lookup(name).(*types.Const)
		if !ok || !c.Exported() {
			continue
		}
		named, ok := c.Type().(*types.Named)
		if !ok {
			continue
		}
		prefix, ok := prefixes[named.Obj().Name()]
		if !ok {
			continue
		}
		count[prefix]++
		bit := pkg.Constant(name)
		found := 0
		for _, f := range sets[prefix] {
			if f.bit == bit {
				found++
			}
		}
		if found != 1 {
			t.Errorf("%s stands in the table %d times", name, found)
		}
	}
	for prefix, set := range sets {
		if len(set) != count[prefix] {
			t.Errorf("%s has %d members and %d constants", prefix, len(set), count[prefix])
		}
	}
}

func ExampleFeatures_String() {
	fmt.Println(FeatureWPAsync | FeatureThreadID | 1<<40)
	fmt.Println(Features(0))
	// Output:
	// THREAD_ID|WP_ASYNC|1<<40
	// 0
}
