// Package golden compares what a package says of the kernel's ABI with what a C
// compiler says of the kernel's headers, on every architecture that Go has for
// Linux. The tables are made by internal/abigen.
package golden

import (
	"bufio"
	"cmp"
	"go/ast"
	"go/build"
	"go/constant"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// tables has the table of each architecture. They differ in how the requests of
// ioctl(2) are made up.
var tables = map[string]string{
	"386":      "abi_generic.txt",
	"amd64":    "abi_generic.txt",
	"arm":      "abi_generic.txt",
	"arm64":    "abi_generic.txt",
	"loong64":  "abi_generic.txt",
	"riscv64":  "abi_generic.txt",
	"s390x":    "abi_generic.txt",
	"mips":     "abi_powerpc.txt",
	"mipsle":   "abi_powerpc.txt",
	"mips64":   "abi_powerpc.txt",
	"mips64le": "abi_powerpc.txt",
	"ppc64":    "abi_powerpc.txt",
	"ppc64le":  "abi_powerpc.txt",
}

// Compare runs a subtest for each architecture: of the header, the table in the
// directory dir and the package in the working directory, as describe lists it by
// the kernel's names, must have the same items, at least so many.
func Compare(t *testing.T, dir, header string, atLeast int, describe func(*Package) map[string]uint64) {
	for arch, file := range tables {
		t.Run(arch, func(t *testing.T) {
			table := readTable(t, filepath.Join(dir, file), header)
			if len(table) < atLeast {
				t.Fatalf("%s has only %d items of %s", file, len(table), header)
			}
			ours := describe(Check(t, arch))
			for item, want := range table {
				if got, ok := ours[item]; !ok {
					t.Errorf("the header has %s = %#x, this package does not", item, want)
				} else if got != want {
					t.Errorf("%s is %#x, the header has %#x", item, got, want)
				}
			}
			for item, got := range ours {
				if _, ok := table[item]; !ok {
					t.Errorf("this package has %s = %#x, the header does not", item, got)
				}
			}
		})
	}
}

// readTable reads the lines "KIND NAME VALUE" that follow "# <header>".
func readTable(t *testing.T, file, header string) map[string]uint64 {
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	table := make(map[string]uint64)
	here := false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := lines.Text()
		if strings.HasPrefix(line, "#") {
			here = strings.HasPrefix(line, "# "+header)
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
		if !strings.Contains(words[1], ".reserved") {
			table[words[0]+" "+words[1]] = value
		}
	}
	return table
}

// A Package is the source in the working directory as the compiler sees it on one
// architecture.
type Package struct {
	T     *testing.T
	Scope *types.Scope
	Arch  string
	sizes types.Sizes
}

// Check type-checks the package as for arch. Of imported packages it sees
// nothing but a type Addr of 64 bits: no constant or mirror depends on more.
func Check(t *testing.T, arch string) *Package {
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
		Error:    func(error) {}, // the imported packages are all but empty
	}
	pkg, _ := config.Check(dir.Name, fset, files, nil)
	return &Package{t, pkg.Scope(), arch, sizes}
}

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

// Constant returns the value of a constant.
func (p *Package) Constant(name string) uint64 {
	p.T.Helper()
	c, ok := p.Scope.Lookup(name).(*types.Const)
	if !ok {
		p.T.Fatalf("no constant %s", name)
	}
	value, exact := constant.Uint64Val(constant.ToInt(c.Val()))
	if !exact {
		p.T.Fatalf("%s is %v", name, c.Val())
	}
	return value
}

// Struct lists the sizes and offsets of the struct mirror as those of the
// kernel's struct name in items. fields has the kernel's names of the fields that
// are called otherwise here. A pointer has to be padded to 64 bits, and counts as
// that; those in pointers, and no other fields, have to be pointers, which keep
// what they point to in its place.
func (p *Package) Struct(items map[string]uint64, name, mirror string, fields map[string]string, pointers ...string) {
	p.T.Helper()
	object := p.Scope.Lookup(mirror)
	if object == nil {
		p.T.Fatalf("no struct %s", mirror)
	}
	s, ok := object.Type().Underlying().(*types.Struct)
	if !ok {
		p.T.Fatalf("no struct %s", mirror)
	}
	all := slices.Collect(s.Fields())
	offsets := p.sizes.Offsetsof(all)
	for i, f := range all {
		if f.Name() == "_" {
			continue
		}
		field := name + "." + cmp.Or(fields[f.Name()], f.Name())
		offset, size := offsets[i], p.sizes.Sizeof(f.Type())
		isPointer := f.Type() == types.Typ[types.UnsafePointer]
		if isPointer != slices.Contains(pointers, f.Name()) {
			p.T.Errorf("%s.%s is a %v; pointers have to be: %q", mirror, f.Name(), f.Type(), pointers)
		}
		if isPointer { // with the low half where the value's is
			before, after := p.sizes.Sizeof(all[i-1].Type()), p.sizes.Sizeof(all[i+1].Type())
			offset -= before
			size += before + after
			if bigEndian := p.Arch == "mips"; before+after != 0 && (before != 0) != bigEndian {
				p.T.Errorf("the pointer %s is padded with %d bytes before and %d after", f.Name(), before, after)
			}
		}
		items["offsetof "+field], items["sizeof "+field] = uint64(offset), uint64(size)
	}
	items["sizeof "+name] = uint64(p.sizes.Sizeof(s))
}
