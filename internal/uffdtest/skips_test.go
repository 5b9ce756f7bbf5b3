package uffdtest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestSkips has nothing skip a test but the one function that says what is
// missing.
func TestSkips(t *testing.T) {
	const allowed = "internal/uffdtest/require_linux.go"
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	files, skips := 0, 0
	err = filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(name, ".go") {
			return err
		}
		files++
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, name, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			selector, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			switch selector.Sel.Name {
			default:
				return true
			case "Skip":
				of, ok := selector.X.(*ast.Ident)
				if !ok || !slices.Contains([]string{"t", "b", "tb", "f"}, of.Name) {
					return true // a Range's
				}
			case "Skipf", "SkipNow":
			}
			skips++
			if !strings.HasSuffix(filepath.ToSlash(name), allowed) {
				t.Errorf("%v skips a test by itself", set.Position(selector.Pos()))
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 100 || skips != 1 {
		t.Errorf("%d files have %d places that skip, want 1", files, skips)
	}
}
