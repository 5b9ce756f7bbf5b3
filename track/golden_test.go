package track

import (
	"bufio"
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

// TestGoldenABI compares the mirrors and constants of PAGEMAP_SCAN, as the
// compiler sees them on each architecture, with what a C compiler says of
// <linux/fs.h>. Either has to have all that the other has.
func TestGoldenABI(t *testing.T) {
	const generic, powerpc = "../testdata/abi_generic.txt", "../testdata/abi_powerpc.txt"
	for arch, file := range map[string]string{
		"386": generic, "amd64": generic, "arm": generic, "arm64": generic, "loong64": generic,
		"riscv64": generic, "s390x": generic,
		"mips": powerpc, "mipsle": powerpc, "mips64": powerpc, "mips64le": powerpc,
		"ppc64": powerpc, "ppc64le": powerpc,
	} {
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

// readGolden reads the lines "KIND NAME VALUE" of <linux/fs.h>.
func readGolden(t *testing.T, file string) map[string]uint64 {
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	golden := make(map[string]uint64)
	here := false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := lines.Text()
		if strings.HasPrefix(line, "#") {
			here = strings.HasPrefix(line, "# <linux/fs.h>")
			continue
		}
		words := strings.Fields(line)
		if !here || len(words) == 0 {
			continue
		}
		value, err := strconv.ParseUint(words[len(words)-1], 0, 64)
		if len(words) != 3 || err != nil {
			t.Fatalf("%s: bad line %q", file, line)
		}
		golden[words[0]+" "+words[1]] = value
	}
	if len(golden) < 40 {
		t.Fatalf("%s has only %d items", file, len(golden))
	}
	return golden
}

// structs names the mirrors of the kernel's structures and their fields, in
// order.
var structs = map[string]struct {
	mirror string
	fields []string
}{
	"pm_scan_arg": {"pmScanArg", []string{
		"size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages",
		"category_inverted", "category_mask", "category_anyof_mask", "return_mask",
	}},
	"page_region": {"Region", []string{"start", "end", "categories"}},
}

var constants = map[string]string{
	"request PAGEMAP_SCAN":        "reqPagemapScan",
	"const PM_SCAN_WP_MATCHING":   "scanWPMatching",
	"const PM_SCAN_CHECK_WPASYNC": "scanCheckWPAsync",
	"const PAGE_IS_WPALLOWED":     "PageWPAllowed",
	"const PAGE_IS_WRITTEN":       "PageWritten",
	"const PAGE_IS_FILE":          "PageFile",
	"const PAGE_IS_PRESENT":       "PagePresent",
	"const PAGE_IS_SWAPPED":       "PageSwapped",
	"const PAGE_IS_PFNZERO":       "PagePFNZero",
	"const PAGE_IS_HUGE":          "PageHuge",
	"const PAGE_IS_SOFT_DIRTY":    "PageSoftDirty",
	"const PAGE_IS_GUARD":         "PageGuard",
	"const PAGE_IS_ACCESSED":      "PageAccessed",
}

// describe lists what the package has on arch, by the kernel's names.
func describe(t *testing.T, arch string) map[string]uint64 {
	pkg, sizes := typeCheck(t, arch)
	ours := make(map[string]uint64)
	for item, name := range constants {
		c, ok := pkg.Scope().Lookup(name).(*types.Const)
		if !ok {
			t.Fatalf("no constant %s", name)
		}
		value, exact := constant.Uint64Val(constant.ToInt(c.Val()))
		if !exact {
			t.Fatalf("%s is %v", name, c.Val())
		}
		ours[item] = value
		if prefix := "const PAGE_IS_"; strings.HasPrefix(item, prefix) && Categories(value).String() != item[len(prefix):] {
			t.Errorf("%s prints as %v", name, Categories(value))
		}
	}
	for name, s := range structs {
		mirror, ok := pkg.Scope().Lookup(s.mirror).Type().Underlying().(*types.Struct)
		if !ok {
			t.Fatalf("no struct %s", s.mirror)
		}
		var all []*types.Var
		for f := range mirror.Fields() {
			all = append(all, f)
		}
		offsets := sizes.Offsetsof(all)
		i := 0
		for j, f := range all {
			if f.Name() == "_" {
				continue
			}
			if i == len(s.fields) {
				t.Fatalf("%s has more than %d fields", s.mirror, i)
			}
			field := name + "." + s.fields[i]
			offset, size := offsets[j], sizes.Sizeof(f.Type())
			if f.Type() == types.Typ[types.UnsafePointer] { // padded to 64 bits, with the low half where the value's is
				before, after := sizes.Sizeof(all[j-1].Type()), sizes.Sizeof(all[j+1].Type())
				offset -= before
				size += before + after
				if bigEndian := arch == "mips"; before+after != 0 && (before != 0) != bigEndian {
					t.Errorf("the pointer %s is padded with %d bytes before and %d after", f.Name(), before, after)
				}
			}
			ours["offsetof "+field], ours["sizeof "+field] = uint64(offset), uint64(size)
			i++
		}
		if i != len(s.fields) {
			t.Errorf("%s has %d fields, want %d", s.mirror, i, len(s.fields))
		}
		ours["sizeof "+name] = uint64(sizes.Sizeof(mirror))
	}
	return ours
}

// typeCheck checks this package's source as for arch. Of what it imports only
// the addresses matter.
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
		Importer: addresses{},
		Sizes:    sizes,
		Error:    func(error) {}, // the imported packages are empty
	}
	pkg, _ := config.Check("track", fset, files, nil)
	return pkg, sizes
}

// addresses imports packages that have nothing but a type Addr, as wide as
// uffd.Addr, which the golden test of that package checks.
type addresses struct{}

func (addresses) Import(path string) (*types.Package, error) {
	if path == "unsafe" {
		return types.Unsafe, nil
	}
	pkg := types.NewPackage(path, path[strings.LastIndex(path, "/")+1:])
	name := types.NewTypeName(token.NoPos, pkg, "Addr", nil)
	types.NewNamed(name, types.Typ[types.Uint64], nil)
	pkg.Scope().Insert(name)
	pkg.MarkComplete()
	return pkg, nil
}
