package track

import (
	"strings"
	"testing"

	"github.com/go-uffd/uffd/internal/golden"
)

// TestGoldenABI compares the mirrors and constants of PAGEMAP_SCAN, as the
// compiler sees them on each architecture, with what a C compiler says of the
// kernel's header.
func TestGoldenABI(t *testing.T) {
	golden.Compare(t, "../testdata", "<linux/fs.h>", 40, describe)
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

// fields has the kernel's names of the fields that we call otherwise.
var fields = map[string]string{
	"walkEnd": "walk_end", "vecLen": "vec_len", "maxPages": "max_pages", "inverted": "category_inverted",
	"mask": "category_mask", "anyOf": "category_anyof_mask", "returned": "return_mask",

	"Start": "start", "End": "end", "Categories": "categories",
}

// describe lists what the package has, by the kernel's names.
func describe(p *golden.Package) map[string]uint64 {
	ours := make(map[string]uint64)
	for item, name := range constants {
		value := p.Constant(name)
		ours[item] = value
		if prefix := "const PAGE_IS_"; strings.HasPrefix(item, prefix) && Categories(value).String() != item[len(prefix):] {
			p.T.Errorf("%s prints as %v", name, Categories(value))
		}
	}
	p.Struct(ours, "pm_scan_arg", "pmScanArg", fields, "vec")
	p.Struct(ours, "page_region", "Region", fields)
	return ours
}
