//! Bindings over libxen-dev's headers, one set of functions per shared library.
//!
//! Needs Xen's headers (Debian: libxen-dev) and libclang. Without them the committed file of `src/bindings/` is used and
//! a warning says so. The environment decides:
//! - `XENFOLD_REQUIRE_BINDGEN=1`: the fallback is an error (CI),
//! - `XENFOLD_NO_BINDGEN=1`: take the fallback (to test it).
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// The committed bindings, and the release whose headers they were made from.
const FALLBACK: &str = "src/bindings/xen-4.17.rs";

/// A shared library: the Rust module and struct that hold its functions, and what is taken from its headers.
struct Library {
    module: &'static str,
    loader: &'static str,
    header: &'static str,
    functions: &'static [&'static str],
    types: &'static [&'static str],
    constants: &'static [&'static str],
}

const LIBRARIES: &[Library] = &[
    Library {
        module: "toollog",
        loader: "ToollogLib",
        header: "#include <xentoollog.h>",
        functions: &["xtl_createlogger_stdiostream", "xtl_logger_destroy"],
        types: &[],
        constants: &["XTL_.*"],
    },
    Library {
        module: "ctrl",
        loader: "CtrlLib",
        header: "#include <xenctrl.h>\n#include <xen/vm_event.h>",
        functions: &[
            "xc_interface_open",
            "xc_interface_close",
            "xc_version",
            "xc_domain_getinfolist",
            "xc_domain_maximum_gpfn",
            "xc_domain_pause",
            "xc_domain_unpause",
            "xc_hvm_param_get",
            "xc_hvm_param_set",
            "xc_domain_populate_physmap_exact",
            "xc_domain_decrease_reservation_exact",
            "xc_domain_claim_pages",
            "xc_mem_paging_enable",
            "xc_mem_paging_disable",
            "xc_mem_paging_nominate",
            "xc_mem_paging_evict",
            "xc_mem_paging_load",
            "xc_get_max_cpus",
            "xc_getcpuinfo",
            "xc_domain_get_pod_target",
            "xc_logdirty_control",
            "xc_physinfo",
            "xc_memshr_control",
            "xc_memshr_ring_enable",
            "xc_memshr_ring_disable",
            "xc_memshr_nominate_gfn",
            "xc_memshr_share_gfns",
            "xc_memshr_debug_gfn",
            "xc_memshr_audit",
            "xc_sharing_freed_pages",
            "xc_sharing_used_frames",
            "xc__hypercall_buffer_alloc_pages",
            "xc__hypercall_buffer_free_pages",
        ],
        types: &["vm_event_st"],
        constants: &[
            "XEN_DOMINF_.*",
            "XEN_DOMCTL_SHADOW_(OP_(OFF|ENABLE|CLEAN|PEEK|ENABLE_LOGDIRTY)|LOGDIRTY_FINAL)",
            "SHUTDOWN_.*",
            "XENVER_version",
            "XC_PAGE_SIZE",
            "DOMID_FIRST_RESERVED",
            "HVM_PARAM_.*",
            "XENMEM_SHARING_OP_[SC]_HANDLE_INVALID",
            "VM_EVENT_(INTERFACE_VERSION|FLAG_(VCPU_PAUSED|FOREIGN)|REASON_MEM_(PAGING|SHARING))",
            "MEM_PAGING_(DROP_PAGE|EVICT_FAIL)",
        ],
    },
    Library {
        module: "evtchn",
        loader: "EvtchnLib",
        header: "#include <xenevtchn.h>",
        functions: &[
            "xenevtchn_open",
            "xenevtchn_close",
            "xenevtchn_fd",
            "xenevtchn_notify",
            "xenevtchn_bind_interdomain",
            "xenevtchn_unbind",
            "xenevtchn_pending",
            "xenevtchn_unmask",
        ],
        types: &[],
        constants: &[],
    },
    Library {
        module: "devicemodel",
        loader: "DevicemodelLib",
        header: "#include <xendevicemodel.h>",
        functions: &[
            "xendevicemodel_open",
            "xendevicemodel_close",
            "xendevicemodel_modified_memory_bulk",
        ],
        types: &[],
        constants: &[],
    },
    Library {
        module: "foreignmemory",
        loader: "ForeignmemoryLib",
        header: "#include <xenforeignmemory.h>",
        functions: &[
            "xenforeignmemory_open",
            "xenforeignmemory_close",
            "xenforeignmemory_map",
            "xenforeignmemory_unmap",
        ],
        types: &[],
        constants: &[],
    },
    Library {
        module: "store",
        loader: "StoreLib",
        header: "#include <stdbool.h>\n#include <stdint.h>\n#include <xenstore.h>",
        functions: &[
            "xs_open",
            "xs_close",
            "xs_read",
            "xs_write",
            "xs_rm",
            "xs_directory",
            "xs_watch",
            "xs_unwatch",
            "xs_read_watch",
            "xs_check_watch",
            "xs_fileno",
            "xs_get_domain_path",
        ],
        types: &[],
        constants: &["XBT_NULL", "XS_UNWATCH_FILTER"],
    },
    Library {
        module: "light",
        loader: "LightLib",
        header: "#include <libxl.h>\n#include <libxl_utils.h>\n#include <libxl_event.h>",
        functions: &[
            "libxl_ctx_alloc",
            "libxl_ctx_free",
            "libxl_childproc_setmode",
            "libxl_domain_resume",
            "libxl_domain_rename",
            "libxl_domain_unpause",
            "libxl_domain_destroy",
            "libxl_domid_to_name",
            "libxl_name_to_domid",
        ],
        types: &["libxl_error"],
        constants: &["LIBXL_VERSION"],
    },
];

fn main() {
    for variable in [
        "XENFOLD_REQUIRE_BINDGEN",
        "XENFOLD_NO_BINDGEN",
        "LIBCLANG_PATH",
        "PKG_CONFIG_PATH",
    ] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={FALLBACK}");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("bindings.rs");
    match generate() {
        Ok(text) => {
            fs::write(&out, text).expect("OUT_DIR is writable");
            println!("cargo:rustc-env=XEN_SYS_BINDINGS=generated");
        }
        Err(reason) if is_set("XENFOLD_REQUIRE_BINDGEN") => {
            panic!("XENFOLD_REQUIRE_BINDGEN is set, and the bindings could not be generated: {reason}");
        }
        Err(reason) => {
            println!("cargo:warning=xen-sys uses the committed bindings {FALLBACK}: {reason}");
            fs::copy(FALLBACK, &out).expect("the committed bindings are there");
            println!("cargo:rustc-env=XEN_SYS_BINDINGS=fallback");
        }
    }
}

fn is_set(variable: &str) -> bool {
    env::var_os(variable).is_some_and(|value| !value.is_empty() && value != "0")
}

/// All bindings as one file with a module per library, or why they cannot be made here.
fn generate() -> Result<String, String> {
    if is_set("XENFOLD_NO_BINDGEN") {
        return Err("XENFOLD_NO_BINDGEN is set".into());
    }
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        return Err("only x86_64 is supported".into());
    }
    let (major, minor) = headers_version()?;
    let mut text = format!(
        "// Generated by xen-sys/build.rs from the headers of Xen {major}.{minor}. Do not edit.\n\n\
         /// The release (major, minor) whose headers these bindings were made from.\n\
         pub const XEN_VERSION: (u32, u32) = ({major}, {minor});\n\n\
         pub use libc::FILE;\n\
         #[repr(C)]\npub struct xentoollog_logger {{\n    _unused: [u8; 0],\n}}\n\
         #[repr(C)]\npub struct libxl_asyncop_how {{\n    _unused: [u8; 0],\n}}\n"
    );
    for library in LIBRARIES {
        // bindgen panics when libclang cannot be loaded; to us that is one more reason for the fallback.
        let bindings = std::panic::catch_unwind(|| bind(library))
            .map_err(|_| "libclang cannot be loaded (Debian: libclang-14-dev)".to_string())??;
        text.push_str(&format!("\npub mod {} {{\n", library.module));
        text.push_str(bindings.trim_end());
        text.push_str("\n}\n");
    }
    Ok(text)
}

fn bind(library: &Library) -> Result<String, String> {
    let mut builder = bindgen::builder()
        .header_contents(&format!("{}.h", library.module), library.header)
        .clang_arg("-D__XEN_TOOLS__")
        .dynamic_library_name(library.loader)
        .dynamic_link_require_all(false)
        .allowlist_recursively(true)
        // Only pointers to these cross the border; the file's head has one type for each.
        .blocklist_type("FILE|_IO_.*|__off(64)?_t|.*va_list.*|xentoollog_logger|libxl_asyncop_how")
        // Of vm_event, only requests of paging and sharing are looked into.
        .opaque_type(
            "vm_event_(regs|mem_access|write|mov|desc|singlestep|fast|debug|cpuid|vmexit|interrupt|emul|x86).*",
        )
        .raw_line("use super::{FILE, libxl_asyncop_how, xentoollog_logger};")
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .rust_edition(bindgen::RustEdition::Edition2024)
        .wrap_unsafe_ops(true)
        .disable_header_comment()
        .generate_comments(false)
        .formatter(bindgen::Formatter::Prettyplease);
    for function in library.functions {
        builder = builder.allowlist_function(function);
    }
    for name in library.types {
        builder = builder.allowlist_type(name);
    }
    for constant in library.constants {
        builder = builder.allowlist_var(constant);
    }
    Ok(builder.generate().map_err(|error| error.to_string())?.to_string())
}

/// Xen's release from the headers' package. No header carries it (`__XEN_LATEST_INTERFACE_VERSION__` is older than the
/// release), and it names the libraries whose ABI changes with each.
fn headers_version() -> Result<(u32, u32), String> {
    let pkg_config = Command::new("pkg-config").args(["--modversion", "xencontrol"]).output();
    let version = match pkg_config {
        Ok(out) if out.status.success() => String::from_utf8_lossy(&out.stdout).trim().to_string(),
        _ => version_from_pc_file().ok_or("Xen's headers are missing (Debian: libxen-dev)")?,
    };
    let mut numbers = version.split('.').map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => Err(format!("xencontrol.pc has no usable version: {version}")),
    }
}

/// The same without the program pkg-config.
fn version_from_pc_file() -> Option<String> {
    ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib"]
        .iter()
        .find_map(|folder| fs::read_to_string(Path::new(folder).join("pkgconfig/xencontrol.pc")).ok())?
        .lines()
        .find_map(|line| line.strip_prefix("Version:").map(|version| version.trim().to_string()))
}
