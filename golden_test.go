package uffd

import (
	"bufio"
	"cmp"
	"fmt"
	"go/ast"
	"go/build"
	"go/constant"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"strconv"
	"strings"
	"testing"
)

// architectures are those that Go has for Linux, with the golden table of each.
var architectures = map[string]string{
	"386":      "testdata/abi_generic.txt",
	"amd64":    "testdata/abi_generic.txt",
	"arm":      "testdata/abi_generic.txt",
	"arm64":    "testdata/abi_generic.txt",
	"loong64":  "testdata/abi_generic.txt",
	"riscv64":  "testdata/abi_generic.txt",
	"s390x":    "testdata/abi_generic.txt",
	"mips":     "testdata/abi_powerpc.txt",
	"mipsle":   "testdata/abi_powerpc.txt",
	"mips64":   "testdata/abi_powerpc.txt",
	"mips64le": "testdata/abi_powerpc.txt",
	"ppc64":    "testdata/abi_powerpc.txt",
	"ppc64le":  "testdata/abi_powerpc.txt",
}

// TestGoldenABI compares this package, as the compiler sees it on each
// architecture, with what a C compiler says of the kernel's header. Either has
// to have all that the other has.
func TestGoldenABI(t *testing.T) {
	for arch, file := range architectures {
		t.Run(arch, func(t *testing.T) {
			golden := readGolden(t, file)
			ours := describe(t, arch)
			for item, want := range golden {
				if got, ok := ours[item]; !ok {
					t.Errorf("the header has %s = %#x, this package does not", item, want)
				} else if got != want {
					t.Errorf("%s is %#x, the header has %#x", item, got, want)
				}
			}
			for item, got := range ours {
				if _, ok := golden[item]; !ok {
					t.Errorf("this package has %s = %#x, the header does not", item, got)
				}
			}
		})
	}
}

// readGolden reads the lines "KIND NAME VALUE" of <linux/userfaultfd.h>.
func readGolden(t *testing.T, file string) map[string]uint64 {
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	golden := make(map[string]uint64)
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := lines.Text()
		if strings.HasPrefix(line, "# <linux/fs.h>") {
			break
		}
		words := strings.Fields(line)
		if len(words) == 0 || words[0] == "#" {
			continue
		}
		value, err := strconv.ParseUint(words[len(words)-1], 0, 64)
		if len(words) != 3 || err != nil {
			t.Fatalf("%s: bad line %q", file, line)
		}
		if !strings.Contains(words[1], ".reserved") {
			golden[words[0]+" "+words[1]] = value
		}
	}
	if len(golden) < 100 {
		t.Fatalf("%s has only %d items", file, len(golden))
	}
	return golden
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

// describe lists what the package has on arch, by the kernel's names.
func describe(t *testing.T, arch string) map[string]uint64 {
	pkg, sizes := typeCheck(t, arch)
	ours := make(map[string]uint64)
	for item, value := range decoded {
		ours[item] = value
	}
	for item, name := range constants {
		ours[item] = constantOf(t, pkg.Scope().Lookup(name), name)
	}
	for name, mirrorName := range structs {
		object := pkg.Scope().Lookup(mirrorName)
		mirror, ok := object.Type().Underlying().(*types.Struct)
		if !ok {
			t.Fatalf("no struct %s", mirrorName)
		}
		var all []*types.Var
		for f := range mirror.Fields() {
			all = append(all, f)
		}
		offsets := sizes.Offsetsof(all)
		for j, f := range all {
			if f.Name() == "_" {
				continue
			}
			field := name + "." + cmp.Or(fields[f.Name()], f.Name())
			ours["offsetof "+field] = uint64(offsets[j])
			ours["sizeof "+field] = uint64(sizes.Sizeof(f.Type()))
			isPointer := f.Type() == types.Typ[types.UnsafePointer]
			if isSource := field == "uffdio_copy.src"; isSource != isPointer {
				t.Errorf("%s.%s is a %v: the source, and it alone, has to be a pointer, which keeps it in place", mirrorName, f.Name(), f.Type())
			}
			if isPointer { // padded to 64 bits, with the low half where the value's is
				before, after := sizes.Sizeof(all[j-1].Type()), sizes.Sizeof(all[j+1].Type())
				ours["offsetof "+field] -= uint64(before)
				ours["sizeof "+field] += uint64(before + after)
				if bigEndian := arch == "mips"; before+after != 0 && (before != 0) != bigEndian {
					t.Errorf("the pointer %s is padded with %d bytes before and %d after", f.Name(), before, after)
				}
			}
		}
		ours["sizeof "+name] = uint64(sizes.Sizeof(mirror))
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

func constantOf(t *testing.T, object types.Object, name string) uint64 {
	c, ok := object.(*types.Const)
	if !ok {
		t.Fatalf("no constant %s", name)
	}
	value, exact := constant.Uint64Val(constant.ToInt(c.Val()))
	if !exact {
		t.Fatalf("%s is %v", name, c.Val())
	}
	return value
}

// typeCheck checks this package's source as for arch. Imported packages are
// left empty: no constant or mirror depends on them.
func typeCheck(t *testing.T, arch string) (*types.Package, types.Sizes) {
	context := build.Default
	context.GOOS, context.GOARCH, context.CgoEnabled = "linux", arch, false
	dir, err := context.ImportDir(".", 0)
	if err != nil {
		t.Fatal(err)
	}
	fset := token.NewFileSet()
	var files []*ast.File
	for _, name := range dir.GoFiles {
		f, err := parser.ParseFile(fset, name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	sizes := types.SizesFor("gc", arch)
	config := types.Config{
		Importer: emptyImporter{},
		Sizes:    sizes,
		Error:    func(error) {}, // the imported packages are empty
	}
	pkg, _ := config.Check("uffd", fset, files, nil)
	return pkg, sizes
}

type emptyImporter struct{}

func (emptyImporter) Import(path string) (*types.Package, error) {
	if path == "unsafe" {
		return types.Unsafe, nil
	}
	pkg := types.NewPackage(path, path[strings.LastIndex(path, "/")+1:])
	pkg.MarkComplete()
	return pkg, nil
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
	pkg, _ := typeCheck(t, "amd64")
	count := make(map[string]int)
	for _, name := range pkg.Scope().Names() {
		c, ok := pkg.Scope().Lookup(name).(*types.Const)
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
		bit := constantOf(t, c, name)
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
