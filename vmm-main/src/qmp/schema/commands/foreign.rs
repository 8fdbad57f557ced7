//! Commands of StratoVirt's other boards, about what these boards do not have.
//!
//! A client that speaks to StratoVirt may send them to any VM: it is told what is missing, which "no such command" would not
//! tell.

use crate::qmp::command::QmpError;
use crate::qmp::schema::types::{Command, Type, here, may, must};

const NO_DISPLAY: &str = "There is no display, keyboard or pointer: no board here has one";
const NO_CAMERA: &str = "There is no camera: no board here has USB";
const NO_REGIONS: &str = "The board's regions of memory are fixed";

pub(super) static COMMANDS: &[Command] = &[
    here(
        "input_event",
        "Refuses: there is no keyboard or pointer",
        |_, _| Err(QmpError::device_not_active(NO_DISPLAY)),
    )
    .takes(&[
        must("key", Type::TEXT, "`keyboard` or `pointer`"),
        must("value", Type::TEXT, "what happened"),
    ]),
    here(
        "query-display-image",
        "Refuses: there is no display",
        |_, _| Err(QmpError::device_not_active(NO_DISPLAY)),
    )
    .returns(Type::Any),
    here("cameradev_add", "Refuses: there is no camera", |_, _| {
        Err(QmpError::device_not_active(NO_CAMERA))
    })
    .takes(&[
        must("id", Type::ID, "its id"),
        must("driver", Type::TEXT, "what is behind it"),
        may("path", Type::TEXT, "the host's camera"),
    ]),
    here("cameradev_del", "Refuses: there is no camera", |_, _| {
        Err(QmpError::device_not_active(NO_CAMERA))
    })
    .takes(&[must("id", Type::ID, "its id")]),
    here(
        "update_region",
        "Refuses: regions of memory are the board's",
        |_, _| Err(QmpError::generic(NO_REGIONS)),
    )
    .takes(&[
        must("update_type", Type::TEXT, "`add` or `delete`"),
        must("region_type", Type::TEXT, "kind of the region"),
        must("offset", Type::UINT, "where it is"),
        must("size", Type::UINT, "its bytes"),
        must("priority", Type::UINT, "which of two is seen"),
    ])
    .takes_more(),
];
